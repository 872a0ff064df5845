"""Keep the names of millions of files as bytes with offsets: strings would take ten times the memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import BinaryIO, SupportsIndex, overload

import numpy as np

_CHUNK = 1 << 20
"""Number of names that are copied at once."""


class PackedNames(Sequence[str]):
    """N file names, read-only. The arrays may be mapped from a file.

    Args:
        data: uint8: the names one after another, as the file system has them (``os.fsencode``).
        ends: [N] unsigned: where each name ends in ``data``.
        file, offset: the file that ``data`` is mapped from, and where in it ``data`` begins. Single names are then read
            from the file: each look into a mapping would keep 64 KB around it in memory.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, file: BinaryIO | None = None, offset: int = 0) -> None:
        self.data, self.ends = data, ends
        self._file, self._offset = file, offset

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedNames:
        """Copy names."""
        if isinstance(names, PackedNames):
            return names
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.uint64, count=len(encoded)), dtype=np.uint64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), _narrow(ends))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.ends)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        """Return one name, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        if self._file is not None:
            return os.fsdecode(os.pread(self._file.fileno(), end - start, self._offset + start))
        return os.fsdecode(self.data[start:end].tobytes())

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of names."""
        if isinstance(other, PackedNames):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        """Show the first few names."""
        return f"PackedNames({self[:3]}, {len(self)} names)"

    def select_rows(self, rows: np.ndarray) -> PackedNames:
        """Return the names at ``rows`` [n] int64."""
        ends = self.ends.astype(np.uint64)
        starts = np.concatenate([np.zeros(1, dtype=np.uint64), ends[:-1]])[rows]
        lengths = ends[rows] - starts
        chunks = [
            self._gather(starts[first : first + _CHUNK], lengths[first : first + _CHUNK])
            for first in range(0, len(rows), _CHUNK)
        ]
        data = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.uint8)
        return PackedNames(data, _narrow(np.cumsum(lengths, dtype=np.uint64)))

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        before = np.cumsum(lengths, dtype=np.uint64) - lengths
        places = np.repeat(starts - before, lengths.astype(np.int64))
        return self.data[places + np.arange(len(places), dtype=np.uint64)]


def _narrow(ends: np.ndarray) -> np.ndarray:
    """Use four bytes for each offset where they suffice."""
    return ends.astype(np.uint32) if not len(ends) or int(ends[-1]) < 1 << 32 else ends
