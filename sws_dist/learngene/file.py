"""Read learngene files: an auxiliary model's distinct layers, the only thing that has to be kept of it.

A learngene is one ``.safetensors`` file (see ``checkpoint/model_file.py``) of kind ``learngene``. Its tensors carry
timm's names, with ``blocks.i`` the layer of stage i; schedule and geometry stand in the metadata's ``kwargs``. TLEG's
learngene has ``blocks.0.base`` and ``blocks.0.slope`` instead (``models/tleg.py``). A model whose layers share nothing
can be read as a learngene too: each layer is a stage of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sws_dist.checkpoint.model_file import ModelInfo, read_model_info
from sws_dist.checkpoint.safetensors_stream import DTYPE_NAMES
from sws_dist.checkpoint.weight_file import load_tensors
from sws_dist.models import SWSVisionTransformer, TLEGVisionTransformer, geometry

_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def describe_model(model: SWSVisionTransformer, kind: str, **fields: Any) -> ModelInfo:
    """Return the metadata of one of our models; ``fields`` are ModelInfo's other fields, such as ``classes``."""
    kwargs = geometry(model)
    num_classes = kwargs.pop("num_classes")
    name = model.timm_name
    return ModelInfo(kind=kind, name=name, kwargs=kwargs, num_classes=num_classes, **fields)  # type: ignore[arg-type]


def read_learngene_info(path: str | Path) -> ModelInfo:
    """Read the metadata of a learngene, or of one of our models. Raises ``ValueError`` for any other file."""
    info = read_model_info(path)
    if info.kind != "learngene" and info.name != SWSVisionTransformer.timm_name:
        raise ValueError(f"{path}: holds a {info.kind}, not a learngene; an auxiliary run writes learngene.safetensors")
    return info


def is_linear(info: ModelInfo) -> bool:
    """Return True if a learngene's layers are not copied but made of theta_A and theta_B (TLEG)."""
    return info.name == TLEGVisionTransformer.timm_name


class Learngene(NamedTuple):
    """The distinct layers of an auxiliary model, and what its file says of them."""

    info: ModelInfo
    weights: dict[str, Tensor]
    """By timm's names, on the CPU; ``blocks.i`` is the layer of stage i."""

    @property
    def schedule(self) -> tuple[int, ...]:
        """Repeats of each stage's layer in the auxiliary model; for TLEG, its number of layers alone."""
        return tuple(self.info.kwargs["schedule"])

    @property
    def num_parameters(self) -> int:
        """Number of stored parameters."""
        return sum(tensor.numel() for tensor in self.weights.values())


def load_learngene(path: str | Path) -> Learngene:
    """Read a learngene: an auxiliary run's ``learngene.safetensors``.

    Args:
        path: the file; nothing in it is executed.

    Returns:
        The learngene, with its tensors on the CPU in the file's dtype (float32 as training writes it).

    Raises:
        ValueError: not a whole safetensors file, not a learngene, or its tensors do not fit its own geometry.

    Examples:
        >>> import sws_dist
        >>> learngene = sws_dist.load_learngene("runs/auxiliary/learngene.safetensors")
        >>> learngene.schedule
        (2, 2, 2, 2, 2)
        >>> learngene.weights["blocks.0.attn.qkv.weight"].shape
        torch.Size([288, 96])
    """
    learngene = Learngene(read_learngene_info(path), load_tensors(path))
    _check_stages(path, learngene.info, learngene.weights)
    return learngene


@dataclass(frozen=True)
class LearngeneHeader:
    """Header of a learngene's file: metadata, shapes and widest dtype, without the weights.

    ``fingerprint`` is equal where two ranks see the same file: a checksum over its header, its size and its last MiB.
    """

    info: ModelInfo
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    """The widest dtype of its tensors."""
    fingerprint: str


def read_learngene_header(path: str | Path) -> LearngeneHeader:
    """Read no more than a learngene's header and its last MiB. Raises ``ValueError`` as ``load_learngene`` does."""
    info = read_learngene_info(path)
    with Path(path).open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**20))
        checksum = hashlib.sha256(header + file.read() + str(size).encode()).hexdigest()
    about = json.loads(header)
    del about["__metadata__"]
    unknown = sorted({tensor["dtype"] for tensor in about.values()} - set(_DTYPES))
    if unknown:
        raise ValueError(f"{path}: holds tensors of {', '.join(unknown)}; a learngene's are {', '.join(_DTYPES)}")
    shapes = {name: tuple(tensor["shape"]) for name, tensor in about.items()}
    _check_stages(path, info, shapes)
    dtype = max((_DTYPES[tensor["dtype"]] for tensor in about.values()), key=lambda dtype: dtype.itemsize)
    return LearngeneHeader(info, shapes, dtype, checksum)


def _check_stages(path: str | Path, info: ModelInfo, names: Mapping[str, Any]) -> None:
    stages = {int(match[1]) for name in names if (match := BLOCK.match(name))}
    schedule = info.kwargs["schedule"]
    if stages != set(range(len(schedule))):
        raise ValueError(
            f"{path}: layers for stages {sorted(stages)}, but its schedule {schedule} needs {len(schedule)}"
        )
