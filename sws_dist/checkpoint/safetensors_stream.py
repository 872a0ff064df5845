"""Write a ``.safetensors`` file one tensor at a time, with a checksum: memory for the largest tensor is enough.

The safetensors library itself wants all tensors in memory. The format is eight bytes of length, a JSON header, and
the tensors' bytes (github.com/huggingface/safetensors); its library reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write: ``read`` is called when its turn comes, and may return it on any device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Return the entry of a tensor that is in memory already."""
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of a file, to be compared when it is read again."""

    bytes: int
    sha256: str


def write_safetensors(path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> FileDigest:
    """Write ``entries`` in their order, and flush them to the disk.

    Returns:
        Size and checksum of the file.
    """
    entries = list(entries)
    checksum, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(piece: bytes | memoryview) -> None:
            nonlocal size
            file.write(piece)
            checksum.update(piece)
            size += len(piece)

        put(_header(entries, metadata))
        for e in entries:
            tensor = e.read()
            if tuple(tensor.shape) != e.shape:
                raise AssertionError(f"{e.name}: {tuple(tensor.shape)} was read, {e.shape} announced")
            flat = tensor.detach().to("cpu", e.dtype).contiguous().reshape(-1)
            put(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(size, checksum.hexdigest())


def digest(path: Path) -> FileDigest:
    """Measure size and checksum of a file on the disk."""
    with path.open("rb") as file:
        checksum = hashlib.sha256()
        while piece := file.read(1 << 22):
            checksum.update(piece)
        return FileDigest(file.tell(), checksum.hexdigest())


def _header(entries: list[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for e in entries:
        start, end = end, end + math.prod(e.shape) * e.dtype.itemsize
        header[e.name] = {"dtype": DTYPE_NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
