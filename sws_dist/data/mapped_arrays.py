"""Keep arrays and a few texts in one file, and map the arrays: the processes of a node then share them.

The file is a safetensors file; the texts are one JSON document in its metadata. The format's own library writes files
that only their owner may read (0.8), whatever the umask is, and these lie in folders that many users share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sws_dist.atomic import atomic_write

_TYPES = (np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float16)
_DTYPES = dict(zip(("U8", "U16", "U32", "U64", "I32", "I64", "F16"), _TYPES, strict=True))
_TEXTS = "sws_dist"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, Any]) -> Path:
    """Write arrays, and texts that JSON can hold; the file appears whole or not at all."""
    header: dict[str, Any] = {"__metadata__": {_TEXTS: json.dumps(texts)}}
    end = 0
    for name, array in arrays.items():
        dtype = next(code for code, known in _DTYPES.items() if known == array.dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data)

    return atomic_write(path, write)


class MappedFile(NamedTuple):
    """The arrays and texts of a file, and where each array begins in it, in bytes."""

    arrays: dict[str, np.ndarray]
    texts: dict[str, Any]
    offsets: dict[str, int]


def map_arrays(path: Path) -> MappedFile:
    """Map what ``save_arrays`` wrote, read-only. Nothing is read but the header.

    Raises:
        OSError: the file cannot be read.
        ValueError: any other file, or one that was cut.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    texts = json.loads(header.pop("__metadata__")[_TEXTS])
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
    arrays, offsets = {}, {}
    for name, about in header.items():
        first, last = (8 + length + offset for offset in about["data_offsets"])
        if last > len(whole):
            raise ValueError("its end is missing")
        offsets[name] = first
        # A plain array: indexing a memmap costs several times as much.
        arrays[name] = np.asarray(whole[first:last]).view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return MappedFile(arrays, texts, offsets)
