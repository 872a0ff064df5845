"""Load weights into models: files of this trainer, which describe their model, and those of other programs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sws_dist.checkpoint.foreign_model import describe_foreign, is_same_model
from sws_dist.checkpoint.model_file import ModelInfo, find_model_info, load_weights_strict
from sws_dist.checkpoint.weight_file import read_weight_file
from sws_dist.checkpoint.weight_names import convert_weights
from sws_dist.models import create_model
from sws_dist.models.image_size import image_size_arguments, usual_image_size

log = logging.getLogger(__name__)


def load_model(
    path: str | Path, name: str | None = None, *, image_size: int | None = None, use_ema: bool = True
) -> Any:
    """Build the model of a weight file, with its weights, on the CPU.

    How the model wants its images and what its labels are called stand in ``pretrained_cfg``, as in any timm model.

    Args:
        path: ``.safetensors``, or a PyTorch file of tensors, as this trainer or another program wrote it.
        name: the timm model (ours included) that the weights are of; None: what the file says.
        image_size: height and width in pixels, for which the model is built and its position embedding resampled.
        use_ema: take averaged weights where the file has them beside others.

    Raises:
        ValueError: a file that cannot be read, a file that names no model where ``name`` is None, weights that do not
            fit, or none of a classifier.
    """
    file = read_weight_file(path)
    info = find_model_info(path) or describe_foreign(file, name)
    name = name or (info.name if info else None)
    if name is None:
        raise ValueError(f"{path} does not say which model it is of; name it (--model NAME, model_name)")
    # The file's arguments are those of its own model.
    kwargs = dict(info.kwargs) if info and (is_same_model(name, info.name) or name.startswith("sws_")) else {}
    if image_size is not None:
        kwargs |= image_size_arguments(name, image_size)
    known = {"num_classes": info.num_classes} if info else {}
    with torch.device("meta"):
        skeleton = create_model(name, **kwargs, **known)
    weights, dropped = convert_weights(file, skeleton, use_ema=use_ema)
    num_classes = _labels_of(skeleton, weights)
    if num_classes is None:
        raise ValueError(
            f"{path}: has no classifier ({', '.join(classifier_layers(skeleton))}): it is a backbone, to be fine-tuned "
            "first (sws finetune)"
        )
    if _is_behind_lost_layer(dropped):
        raise ValueError(
            f"{path}: its head was trained behind a layer that timm's {name} no longer has (pre_logits), so its logits "
            "would be wrong; fine-tune it, with a new head (sws finetune), or take the weights that timm has today"
        )
    if info and info.classes and len(info.classes) != num_classes:
        raise ValueError(
            f"{path}: its head knows {num_classes} labels, but config.json beside it names {len(info.classes)}; is it "
            "of another file?"
        )
    model = create_model(name, **kwargs, num_classes=num_classes)
    if info:
        set_input_description(model, info)
    _load(model, weights, path, image_size)
    return model


def load_initial_weights(
    model: Any, path: str | Path, classes: Sequence[str], image_size: int, *, use_ema: bool = True
) -> None:
    """Load a file's weights into a model that is to be trained, and log what of them is taken.

    A head of other labels stays as it is in ``model``, freshly drawn. Everything else has to fit; position embeddings
    are resampled.

    Args:
        classes: the names of the model's labels.
        image_size: height and width in pixels, for which the model was built.

    Raises:
        ValueError: a file that cannot be read, or weights that do not fit.
    """
    file = read_weight_file(path)
    weights, dropped = convert_weights(file, model, use_ema=use_ema)
    info = find_model_info(path) or describe_foreign(file, model.pretrained_cfg["architecture"])
    known = info.classes if info else []
    if set(known) == set(classes) and known != list(classes):
        log.info(f"{path}: the rows of its head are put into the order of the data's classes")
        _reorder_head(model, weights, [known.index(name) for name in classes])
    labels = _labels_of(model, weights)
    is_lost = labels is not None and _is_behind_lost_layer(dropped)
    if labels != model.num_classes or (known and set(known) != set(classes)) or is_lost:
        found = f"knows {labels} labels" if labels else "has none"
        if is_lost:
            found = "has one that was trained behind a layer which timm's model no longer has (pre_logits)"
        elif labels == model.num_classes:
            found += " of other names"
        log.warning(f"the head is new: {path} {found}, the data has {model.num_classes} classes")
        _keep_own_head(model, weights)
    elif not known:
        log.info(f"the head is kept: {path} knows {labels} labels, taken for the data's in their order")
    _load(model, weights, path, image_size)


def _is_behind_lost_layer(dropped: Sequence[str]) -> bool:
    """Return True if a file's head was trained behind the layer that old ViTs of ImageNet-21k had in front of it."""
    return any("pre_logits" in name for name in dropped)


def classifier_layers(model: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers: one, or two where it was distilled."""
    found = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def set_input_description(model: Any, info: ModelInfo) -> None:
    """Write a file's preprocessing and labels into ``model.pretrained_cfg``, where timm's tools look for them."""
    known = {key: value for key, value in info.preprocessing.items() if key != "image_size"}
    if known:  # files before crop_mode: all were scored on the centre
        known.setdefault("crop_mode", "center")
    if size := info.preprocessing.get("image_size"):
        known["input_size"] = (info.kwargs.get("in_chans", 3), size, size)
    labels = {"num_classes": info.num_classes, "label_names": tuple(info.classes) or None}
    model.pretrained_cfg = model.pretrained_cfg | known | labels


def _load(model: Any, weights: Mapping[str, Tensor], path: str | Path, image_size: int | None) -> None:
    """Load strictly; an error says also which image size the model usually has, since that changes shapes."""
    usual = usual_image_size(model)
    try:
        load_weights_strict(model, weights, path)
    except ValueError as error:
        if None in (usual, image_size) or usual == image_size:
            raise
        raise ValueError(
            f"{error}\nThe model is built for images of {image_size} pixels, its usual size is {usual}: weights whose "
            f"shapes depend on it need data.image_size (--image-size) {usual}"
        ) from None


def _labels_of(model: Any, weights: Mapping[str, Tensor]) -> int | None:
    """Return how many labels the classifier among ``weights`` knows; None if there is none."""
    layers = classifier_layers(model)
    known = [weights[f"{layer}.weight"].shape[0] for layer in layers if f"{layer}.weight" in weights]
    return next(iter(known), None) if layers else model.num_classes


def _head_tensors(model: nn.Module) -> list[str]:
    names = {f"{layer}.{kind}" for layer in classifier_layers(model) for kind in ("weight", "bias")}
    return [name for name in model.state_dict() if name in names]


def _keep_own_head(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    weights |= {name: own[name].clone() for name in _head_tensors(model)}


def _reorder_head(model: nn.Module, weights: dict[str, Tensor], rows: list[int]) -> None:
    for name in _head_tensors(model):
        if name in weights and len(weights[name]) == len(rows):
            weights[name] = weights[name][rows]
