"""Read weight files that other programs wrote, without executing anything in them.

Training scripts store their weights in many ways: bare, under ``model`` or ``state_dict``, beside an average
(``model_ema``), an optimizer and their arguments. ``read_weight_file`` returns every dictionary of tensors in a file;
``weight_names.py`` finds out which of them a model needs.
"""

from __future__ import annotations

import argparse
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PLAIN_OBJECTS: list[Any] = [
    # Training scripts store their parsed arguments beside the weights; a Namespace holds plain data only.
    argparse.Namespace,
    pathlib.PosixPath,
    # A best score is often a NumPy scalar. NumPy 1 and 2 write the function that makes one under two names.
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]
"""Objects that a PyTorch file may hold beside tensors: making them runs no code of the file's."""
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file."""

    path: Path
    groups: dict[str, dict[str, Tensor]]
    """Dictionaries of tensors by their place in the file: ``""`` is the file's own, ``model``, ``ema.module``, ..."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What a training script stored of itself: its parsed arguments, and the ``arch`` that timm's writes beside."""


def read_weight_file(path: str | Path) -> WeightFile:
    """Read all tensors of a ``.safetensors`` or PyTorch file, on the CPU. The content decides, not the file's name.

    Raises:
        ValueError: no file of weights (with what it is instead), one that is cut short, or one that needs objects
            whose making could run code.
    """
    path = Path(path)
    require_weights(path)
    if is_safetensors(path):
        return WeightFile(path, {"": load_tensors(path)})
    content = _load_pytorch(path)
    groups = dict(_tensor_groups(content))
    if not groups:
        found = f"a {type(content).__name__}" if not isinstance(content, Mapping) else f"keys {list(content)[:8]}"
        raise ValueError(
            f"{path}: expected a dictionary of tensors, bare or under a key such as 'model'; found {found}"
        )
    return WeightFile(path, groups, _arguments_in(content))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def open_safetensors(path: str | Path) -> Any:
    """Open a safetensors file. Raises ``ValueError`` for any other, saying what it is."""
    require_weights(path)
    if not is_safetensors(path):
        raise ValueError(f"{path}: a PyTorch file, where a safetensors file is needed")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def is_safetensors(path: str | Path) -> bool:
    """Return True unless a file begins as PyTorch's do: a zip archive, or a pickle before PyTorch 1.6."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return _begins_like_safetensors(head) or not head.startswith((b"PK", b"\x80"))


def _begins_like_safetensors(head: bytes) -> bool:
    """Return True if the length of a header (of 100 MB at most, says the format) comes first, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def require_weights(path: str | Path) -> None:
    """Raise ``ValueError`` for what is no weight file at all, such as a failed download, with what it is."""
    path = Path(path)
    if path.is_dir():
        if (path / "state.json").is_file():
            raise ValueError(f"{path}: a training checkpoint; sws convert --checkpoint writes its weights to one file")
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise ValueError(f"{path}: a folder, not a file" + (f"; inside is {', '.join(inside[:5])}" if inside else ""))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(512)
    if _begins_like_safetensors(head):  # its length may look like the mark of any archive
        return
    problem = _what_else(head) or (_what_else_zipped(path) if head.startswith(b"PK") else None)
    if problem is not None:
        raise ValueError(f"{path}: not weights but {problem}")


def _what_else(head: bytes) -> str | None:
    """Return what a file that begins with ``head`` is, if that is anything but weights."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "an empty file (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer to them; run git lfs pull where it was cloned"
    if text.startswith(b"<"):
        return "a web page (HTML or XML), as failed downloads leave it; download the file again"
    archive = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    archive = "tar" if head[257:262] == b"ustar" else archive
    if archive is not None:
        return f"a {archive} archive; unpack it first"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras)"
    if text.startswith((b"{", b"[")):
        return "JSON text" + ("; weights in several files have to be joined first" if b'"weight_map"' in head else "")
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"text: {head[:60].decode()!r}"
    return None


def _what_else_zipped(path: Path) -> str | None:
    """Return what a zip archive is, if that is anything but a PyTorch file of weights."""
    if not zipfile.is_zipfile(path):
        return "the beginning of a PyTorch file, cut short; download or copy it again"
    with zipfile.ZipFile(path) as archive:
        endings = {Path(name).name: Path(name).suffix for name in archive.namelist()}
    if ".npy" in endings.values():
        return "a NumPy archive (JAX weights)"
    if "constants.pkl" in endings:
        return "a TorchScript program; save the model's state_dict() instead"
    return None if "data.pkl" in endings else "a zip archive; unpack it first"


def _load_pytorch(path: Path) -> Any:
    try:
        # An open file: torch decides by the ending of a path, which may be wrong.
        with torch.serialization.safe_globals(_PLAIN_OBJECTS), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise ValueError(f"{path}: {_why_not_loaded(path, error)}") from None


def _why_not_loaded(path: Path, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "GLOBAL " in str(error) or "global" in lines[0].lower() or "Unsupported class" in str(error):
        return (
            f"not plain tensors: it holds {_unsafe_objects(path)}, and making such objects can run code. If you trust "
            "the file, save its weights alone from a program of yours: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')"
        )
    return f"not a PyTorch file of plain tensors, or cut short: {lines[0]}"


def _unsafe_objects(path: Path) -> str:
    """Name the classes and functions that a PyTorch file needs and that are not allowed."""
    try:
        with torch.serialization.safe_globals(_PLAIN_OBJECTS):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # files of PyTorch before 1.6 cannot be asked
        found = []
    return ", ".join(sorted(found)[:5]) or "Python objects"


def _tensor_groups(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dictionary that holds tensors, with its place: the keys that lead to it, joined by dots."""
    if isinstance(content, Mapping):
        tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            yield place, tensors
        for key, value in content.items():
            yield from _tensor_groups(value, f"{place}.{key}" if place else str(key))


def _arguments_in(content: Any) -> dict[str, Any]:
    """Return the arguments that a training script stored beside the weights."""
    if not isinstance(content, Mapping):
        return {}
    arguments = content.get("args")
    found = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return found | ({"arch": content["arch"]} if "arch" in content else {})
