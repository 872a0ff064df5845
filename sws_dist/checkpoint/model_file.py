"""Store a model in one ``.safetensors`` file: its weights, how to build it, how to preprocess images, where it is from.

Learngenes, descendants, teachers and finished runs are all stored this way. The metadata holds one JSON document under
``sws_dist``; reading a file never executes anything in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sws_dist.atomic import atomic_write
from sws_dist.checkpoint.safetensors_stream import TensorEntry, tensor_entry, write_safetensors
from sws_dist.checkpoint.weight_file import is_safetensors, load_tensors, open_safetensors, require_weights
from sws_dist.config.schema import DataConfig
from sws_dist.models import create_model

PREPROCESSING = ("mean", "std", "image_size", "crop_pct", "crop_mode", "interpolation")
"""What a file says of its images: keys of ``data`` in a run config."""
VERSION = 2  # version 1 had the key "pixels" for "preprocessing"


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of a weight file: how to build its model, and what it expects."""

    kind: Literal["learngene", "model"]
    """``learngene``: an auxiliary model's distinct layers."""
    name: str
    """For ``create_model``, with ``kwargs``."""
    kwargs: dict[str, Any]
    num_classes: int
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """The values of ``PREPROCESSING``."""
    classes: list[str] = field(default_factory=list)
    """The labels' names in order."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Origin of the weights: run, versions, commit."""
    trained_depths: list[int] = field(default_factory=list)
    """The smallest and the largest depth that a learngene was trained at; empty if unknown."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelInfo:
        """Build from the fields of a file of this version or version 1."""
        return cls(**{"preprocessing" if name == "pixels" else name: value for name, value in fields.items()})

    def build(self, **overrides: Any) -> Any:
        """Build the model, with random weights."""
        return create_model(self.name, **(self.kwargs | {"num_classes": self.num_classes} | overrides))


def describe_preprocessing(config: DataConfig) -> dict[str, Any]:
    """Return ``ModelInfo.preprocessing`` of a model whose images are read so."""
    return {key: getattr(config, key) for key in PREPROCESSING}


def describe_other_normalisation(path: str | Path, info: ModelInfo, config: DataConfig) -> str | None:
    """Return a log message if the images of a file's model were normalised otherwise than those of a run, or None."""
    if not {"mean", "std"} <= info.preprocessing.keys():
        return None
    own, now = (f"mean {list(a['mean'])} and std {list(a['std'])}" for a in (info.preprocessing, vars(config)))
    if own == now:
        return None
    return f"{path}: its images were normalised by {own}, those of this run are by {now} (data.mean, data.std)"


def save_model_file(path: str | Path, info: ModelInfo, weights: Mapping[str, Tensor]) -> Path:
    """Write ``weights`` and ``info`` to ``path``, whole or not at all."""
    return write_model_file(path, info, [tensor_entry(name, tensor) for name, tensor in weights.items()])


def write_model_file(path: str | Path, info: ModelInfo, entries: Iterable[TensorEntry]) -> Path:
    """Write a file like ``save_model_file``, with weights that are read one at a time."""
    metadata = {"format": "pt", "sws_dist": json.dumps({"version": VERSION, **asdict(info)})}
    return atomic_write(path, lambda temporary: write_safetensors(temporary, entries, metadata))


def find_model_info(path: str | Path) -> ModelInfo | None:
    """Read the metadata of a file of this trainer; None for weights of another program, which do not have it.

    Raises:
        ValueError: no file of weights, or one that is cut short.
    """
    require_weights(path)
    return _parse_info(path) if is_safetensors(path) else None


def read_model_info(path: str | Path) -> ModelInfo:
    """Read the metadata of a file of this trainer, and no weights.

    Raises:
        ValueError: the file is missing, cut short, not safetensors, or was not written by this trainer.
    """
    info = _parse_info(path)
    if info is None:
        raise ValueError(f"{path}: holds tensors but no description of a model; it was not written by sws_dist")
    return info


def _parse_info(path: str | Path) -> ModelInfo | None:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if "sws_dist" not in metadata:
        return None
    document = json.loads(metadata["sws_dist"])
    version = document.pop("version")
    if version not in (1, VERSION):
        raise ValueError(f"{path}: written in version {version} of the format, this program reads up to {VERSION}")
    return ModelInfo.from_fields(document)


def load_model_file(path: str | Path) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Read metadata and all tensors, on the CPU. Raises ``ValueError`` as ``read_model_info`` does."""
    return read_model_info(path), load_tensors(path)


def load_weights_strict(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy ``weights`` into ``model``; every tensor on both sides must find its partner.

    Raises:
        ValueError: naming the tensors that are missing, left over, or of another shape (both shapes).
    """
    own = model.state_dict()
    problems = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems += [f"{name}: missing in the file" for name in own if name not in weights]
    problems += [f"{name}: not in the model" for name in weights if name not in own]
    if problems:
        raise misfit(source, problems)
    model.load_state_dict(dict(weights), strict=True)


def misfit(source: str | Path, problems: Sequence[str]) -> ValueError:
    """Return the error that ``source`` does not fit a model, with the first few of the tensors' problems."""
    more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
    return ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(problems[:8]) + more)
