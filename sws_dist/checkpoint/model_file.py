"""Store a model in one ``.safetensors`` file: its weights, how to build it, how to preprocess images, where it is from.

Learngenes, descendants, teachers and finished runs are all stored this way. The metadata holds one JSON document under
``sws_dist``; reading a file never executes anything in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sws_dist.atomic import atomic_write
from sws_dist.checkpoint.safetensors_stream import TensorEntry, tensor_entry, write_safetensors
from sws_dist.models import create_model

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
    """Settings of evaluation: ``mean``, ``std``, ``image_size``, ``crop_pct``, ``interpolation``."""
    classes: list[str] = field(default_factory=list)
    """The labels' names in order."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Origin of the weights: run, versions, commit."""
    trained_depths: list[int] = field(default_factory=list)
    """Of a learngene: the smallest and the largest depth that the auxiliary model was trained at; empty if unknown."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelInfo:
        """Build from the fields of a file of this version or version 1."""
        return cls(**{"preprocessing" if name == "pixels" else name: value for name, value in fields.items()})

    def build(self, **overrides: Any) -> Any:
        """Build the model, with random weights."""
        return create_model(self.name, **(self.kwargs | {"num_classes": self.num_classes} | overrides))


def save_model_file(path: str | Path, info: ModelInfo, weights: Mapping[str, Tensor]) -> Path:
    """Write ``weights`` and ``info`` to ``path``, whole or not at all."""
    return write_model_file(path, info, [tensor_entry(name, tensor) for name, tensor in weights.items()])


def write_model_file(path: str | Path, info: ModelInfo, entries: Iterable[TensorEntry]) -> Path:
    """Write a file like ``save_model_file``, with weights that are read one at a time."""
    metadata = {"format": "pt", "sws_dist": json.dumps({"version": VERSION, **asdict(info)})}
    return atomic_write(path, lambda temporary: write_safetensors(temporary, entries, metadata))


def is_described(path: str | Path) -> bool:
    """Return True if a safetensors file says which model it is of. Raises ``ValueError`` for any other file."""
    with _open(path) as file:
        return "sws_dist" in (file.metadata() or {})


def read_model_info(path: str | Path) -> ModelInfo:
    """Read the metadata alone.

    Raises:
        ValueError: the file is missing, cut short, not safetensors, or was not written by this trainer.
    """
    with _open(path) as file:
        metadata = file.metadata() or {}
    if "sws_dist" not in metadata:
        raise ValueError(f"{path}: holds tensors but no description of a model; it was not written by sws_dist")
    document = json.loads(metadata["sws_dist"])
    version = document.pop("version")
    if version not in (1, VERSION):
        raise ValueError(f"{path}: written in version {version} of the format, this program reads up to {VERSION}")
    return ModelInfo.from_fields(document)


def load_model_file(path: str | Path) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Read metadata and all tensors, on the CPU. Raises ``ValueError`` as ``read_model_info`` does."""
    return read_model_info(path), load_tensors(path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors``, or from a PyTorch file without executing anything in it.

    A dictionary with the weights under ``model`` or ``state_dict`` is unwrapped.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)
    import argparse

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # Training scripts store their parsed arguments beside the weights; a Namespace holds plain data only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file can be broken
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a PyTorch file of plain tensors, or cut short: {first_line}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise ValueError(f"{path}: expected a dictionary of tensors, bare or under 'model'")
    return dict(content)


def load_model(path: str | Path, name: str | None = None) -> Any:
    """Build the model of a weight file, with its weights, on the CPU.

    How the model wants its images and what its labels are called stand in ``pretrained_cfg``, as in any timm model.

    Args:
        path: ``.safetensors``, or a PyTorch file of plain tensors.
        name: the timm model (ours included) that the weights are of; None: what the file says.

    Raises:
        ValueError: a file that cannot be read, a file that names no model where ``name`` is None, weights that do not
            fit.
    """
    if Path(path).suffix == ".safetensors" and is_described(path):
        info, weights = load_model_file(path)
        name = name or info.name
        ours = name == info.name or name.startswith("sws_")  # the file's arguments are that model's
        model = create_model(name, num_classes=info.num_classes, **(info.kwargs if ours else {}))
        set_input_description(model, info)
    elif name is None:
        raise ValueError(f"{path} does not say which model it is of; name it (--model NAME, model_name)")
    else:
        weights = load_state_dict_file(path)
        default = create_model(name).num_classes
        model = create_model(name, num_classes=infer_num_labels(name, weights, default))
        weights = apply_timm_filter(model, weights)
    load_weights_strict(model, weights, path)
    return model


def set_input_description(model: Any, info: ModelInfo) -> None:
    """Write a file's preprocessing and labels into ``model.pretrained_cfg``, where timm's tools look for them."""
    known = {key: value for key, value in info.preprocessing.items() if key != "image_size"}
    if size := info.preprocessing.get("image_size"):
        known["input_size"] = (info.kwargs.get("in_chans", 3), size, size)
    labels = {"num_classes": info.num_classes, "label_names": tuple(info.classes) or None}
    model.pretrained_cfg = model.pretrained_cfg | known | labels


def infer_num_labels(name: str, weights: Mapping[str, Tensor], default: int) -> int:
    """Infer how many labels a state dict knows from the classifier that timm names for the model ``name``."""
    about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None  # create_model refuses unknown names
    classifier = (about and about.classifier) or ()
    for layer in (classifier,) if isinstance(classifier, str) else classifier:
        if f"{layer}.weight" in weights:
            return weights[f"{layer}.weight"].shape[0]
    return default


def apply_timm_filter(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a timm model's state dict as timm itself does: renamed, and without what earlier versions stored."""
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return filter_fn(weights, model) if filter_fn is not None else weights


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
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(problems[:8]) + more)
    model.load_state_dict(dict(weights), strict=True)


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
