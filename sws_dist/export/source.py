"""Turn what is to be exported into a plain timm model: one that timm builds and loads without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from sws_dist.checkpoint.foreign_model import describe_file, describe_timm_folder
from sws_dist.checkpoint.load_model import load_model, set_input_description
from sws_dist.checkpoint.model_file import (
    ModelInfo,
    describe_preprocessing,
    find_model_info,
    load_weights_strict,
)
from sws_dist.checkpoint.open_model import find_run_weights, is_timm_folder, load_timm_folder
from sws_dist.data.labels import read_classes
from sws_dist.inference import input_config
from sws_dist.learngene.expand import build_descendant, plan_layers
from sws_dist.learngene.file import describe_model, load_learngene
from sws_dist.models import SWSVisionTransformer, geometry
from sws_dist.models.geometry import timm_arguments
from sws_dist.models.image_size import image_size_arguments, require_image_size


@dataclass(frozen=True)
class ExportSource:
    """A classifier that plain timm can build."""

    model: Any
    """Plain timm's, float32, on the CPU, in evaluation mode."""
    config: dict[str, Any]
    """The content of timm's ``config.json``."""
    info: ModelInfo
    """What our own files say of their model, with its origin."""
    file: Path
    """The file or folder that was read."""
    schedule: tuple[int, ...]
    """Of the learngene that was expanded; else empty."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.config["pretrained_cfg"]["input_size"]
        return channels, height, width


@dataclass
class _Opened:
    """A model with its weights, ours or timm's."""

    model: Any
    file: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of its constructor, where it is not one of ours."""
    provenance: dict[str, Any] = field(default_factory=dict)
    schedule: tuple[int, ...] = ()


def open_source(
    path: Path,
    *,
    model_name: str | None = None,
    depth: int | None = None,
    plan: str | Sequence[int] = "even",
    ema: bool = False,
    image_size: int | None = None,
    classes: Path | None = None,
) -> ExportSource:
    """Open what is to be exported.

    Args:
        path: a finished run's folder, a file of weights, a learngene, or a timm folder.
        model_name: the timm model that a file's weights are of, where it does not say so.
        depth: layers of a learngene's descendant; needed for a learngene.
        plan: see ``sws_dist.expand``.
        ema: a run's averaged weights.
        image_size: height and width in pixels; None: the model's own.
        classes: a file with the names of the labels, one a line in their order.

    Raises:
        ValueError: nothing that can be exported, an option that does not go with it, or a model that timm lacks.
    """
    run_file = None if is_timm_folder(path) else find_run_weights(path, ema)
    if ema and run_file is None:
        raise ValueError(f"--ema: {path} is no run's folder")
    file = run_file or path
    if is_timm_folder(path):
        opened = _open_timm_folder(path, model_name, image_size)
    elif (info := find_model_info(file)) is not None and info.kind == "learngene":
        opened = _open_learngene(file, depth, plan, image_size)
    else:
        opened = _open_weights(file, model_name, image_size)
    if depth is not None and not opened.schedule:
        raise ValueError(f"--depth {depth}: only a learngene can be expanded, and {file} is none")
    return _as_plain_timm(opened, image_size, classes)


def _open_timm_folder(folder: Path, model_name: str | None, image_size: int | None) -> _Opened:
    if model_name is not None:
        raise ValueError(f"{folder}: its config.json says which model it is; leave the name {model_name} out")
    model, about = load_timm_folder(folder, image_size), describe_timm_folder(folder)
    weights = folder / "model.safetensors"
    info = find_model_info(weights) if weights.is_file() else None  # exported before
    return _Opened(model, folder, about.kwargs if about else {}, info.provenance if info else {})


def _open_learngene(file: Path, depth: int | None, plan: str | Sequence[int], image_size: int | None) -> _Opened:
    learngene = load_learngene(file)
    if depth is None:
        raise ValueError(
            f"{file}: a learngene; --depth says how many layers its descendant is to have (the auxiliary model has "
            f"{sum(learngene.schedule)})"
        )
    layers = plan_layers(learngene.info, depth, plan)
    info, model = build_descendant(learngene, layers, image_size=image_size)
    return _Opened(model, file, provenance=info.provenance, schedule=learngene.schedule)


def _open_weights(file: Path, model_name: str | None, image_size: int | None) -> _Opened:
    model, info = load_model(file, model_name, image_size=image_size), describe_file(file, model_name)
    return _Opened(model, file, info.kwargs if info else {}, info.provenance if info else {})


def _as_plain_timm(opened: _Opened, image_size: int | None, classes: Path | None) -> ExportSource:
    """Move the weights into the model that timm builds from a name and arguments which JSON can hold."""
    model, file = opened.model, opened.file
    architecture, arguments = model.pretrained_cfg["architecture"], opened.arguments
    if isinstance(model, SWSVisionTransformer):
        architecture, arguments = _json_arguments(geometry(model))
    elif image_size is not None:
        arguments = arguments | image_size_arguments(architecture, image_size)
    if not timm.models.model_entrypoint(architecture).__module__.startswith("timm."):
        raise ValueError(f"{file}: {architecture} is no model of timm's own, so plain timm could not open the folder")
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    plain = timm.create_model(architecture, num_classes=model.num_classes, **arguments).eval()
    load_weights_strict(plain, model.float().state_dict(), file)
    reading = input_config(model, str(file), file.parent, image_size)
    require_image_size(plain, str(file), reading.image_size)
    fields: dict[str, Any] = {
        "preprocessing": describe_preprocessing(reading),
        "classes": _label_names(model, classes),
        "provenance": _without_local_paths(opened.provenance),
    }
    if isinstance(model, SWSVisionTransformer):
        info = describe_model(model, "model", **fields)
    else:
        info = ModelInfo("model", architecture, arguments, model.num_classes, **fields)
    config = _timm_config(plain, architecture, arguments, info)
    set_input_description(plain, info)
    return ExportSource(plain, config, info, file, opened.schedule)


def _json_arguments(geometry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of the plain ViT with a descendant's geometry, without Python objects.

    Raises:
        ValueError: timm has no such model.
    """
    name, arguments = timm_arguments(geometry)
    if arguments.pop("norm_layer", None) is None:
        return name, arguments
    if geometry["norm_eps"] != 1e-5:
        raise ValueError(f"norm_eps {geometry['norm_eps']}: no ViT of timm's has it; 1e-6 and 1e-5 can be exported")
    return "vit_base_patch16_clip_224", arguments | {"pre_norm": False}  # a ViT whose norms have 1e-5


def _label_names(model: Any, classes: Path | None) -> list[str]:
    """Return the names of the labels, or an empty list."""
    if classes is None:
        return list(model.pretrained_cfg.get("label_names") or ())
    names = read_classes(classes)
    if len(names) != model.num_classes:
        raise ValueError(f"--classes has {len(names)} names, the model knows {model.num_classes} labels")
    return list(names)


def _without_local_paths(provenance: Any) -> Any:
    """Return what is known of a model's origin, with the last two parts of each path: the run and the file."""
    if isinstance(provenance, dict):
        return {key: _without_local_paths(value) for key, value in provenance.items()}
    if isinstance(provenance, str) and Path(provenance).is_absolute():
        return "/".join(Path(provenance).parts[-2:])
    return provenance


def _timm_config(model: Any, architecture: str, arguments: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Return what timm's ``config.json`` holds, in the Hub's layout."""
    about, pool, known = dict(info.preprocessing), getattr(model, "global_pool", None), model.pretrained_cfg
    size = about.pop("image_size")
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **({"global_pool": pool} if isinstance(pool, str) else {}),
        **({"label_names": info.classes} if info.classes else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "sws_dist",
            "custom_load": False,
            "input_size": [getattr(model, "in_chans", None) or known["input_size"][0], size, size],
            "fixed_input_size": known["fixed_input_size"],
            **about,
            "num_classes": model.num_classes,
            "first_conv": known["first_conv"],
            "classifier": known["classifier"],
        },
    }
