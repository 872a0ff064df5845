"""Write a ``.safetensors`` file one tensor at a time: as much memory as the largest of them, and a checksum.

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
    """A tensor to write: ``read`` is asked for it when its turn comes, and may take it from any device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """A tensor that is there already."""
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class FileDigest:
    """What a file must be when it is read again."""

    bytes: int
    sha256: str


def write_safetensors(path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> FileDigest:
    """Write ``entries`` in their order, and flush them to the disk."""
    entries = list(entries)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(piece: bytes | memoryview) -> None:
            nonlocal size
            file.write(piece)
            digest.update(piece)
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
    return FileDigest(size, digest.hexdigest())


def digest(path: Path) -> FileDigest:
    """Size and checksum of what is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
        return FileDigest(file.tell(), digest.hexdigest())


def _header(entries: list[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for e in entries:
        start, end = end, end + math.prod(e.shape) * e.dtype.itemsize
        header[e.name] = {"dtype": DTYPE_NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
