"""Find out which timm model the weights of another program are of, and how it wants its images.

timm's training script stores its arguments beside the weights. In a folder of the Hub, and of ``sws export``, a
``config.json`` lies beside the file. Both become what our own files say of their model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from pydantic import ValidationError
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path

from sws_dist.checkpoint.model_file import PREPROCESSING, ModelInfo, find_model_info
from sws_dist.checkpoint.weight_file import WeightFile, read_weight_file
from sws_dist.config.schema import DEFAULT_CROP_PCT, DataConfig
from sws_dist.models.image_size import image_size_arguments
from sws_dist.models.vit import timm_config

log = logging.getLogger(__name__)


def describe_file(path: str | Path, name: str | None = None) -> ModelInfo | None:
    """Return what a weight file, ours or another program's, says of its model; see ``describe_foreign``."""
    return find_model_info(path) or describe_foreign(read_weight_file(path), name)


def describe_foreign(file: WeightFile, name: str | None = None) -> ModelInfo | None:
    """Return what another program's file, or a ``config.json`` beside it, says of its model; None if it names none.

    Args:
        name: the timm model that the weights are known to be of; what is said of any other is left out.
    """
    info = _described_by_arguments(file) or describe_timm_folder(file.path.parent)
    if info is not None and name is not None and not is_same_model(name, info.name):
        log.info(f"{file.path}: what it, or config.json beside it, says of {info.name} is not read for {name}")
        return None
    return info


def is_same_model(one: str, other: str) -> bool:
    """Return True if two names of timm are of one architecture; a tag after the dot says only whose weights."""
    return one.partition(".")[0] == other.partition(".")[0]


def describe_timm_folder(folder: Path) -> ModelInfo | None:
    """Return what a folder's ``config.json`` says of a timm model, as timm reads it; None if it names none."""
    try:
        said, name, arguments = load_model_config_from_path(folder)
        about = PretrainedCfg(**{key: said[key] for key in PretrainedCfg.__dataclass_fields__ if key in said})
        if not timm.is_model(name):
            return None
        channels, *_, size = about.input_size
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no file, or one of another program
        return None
    # What timm itself passes on to the constructor.
    own = {"in_chans": channels} if channels != 3 else {}
    own |= {"img_size": list(about.input_size[-2:])} if about.fixed_input_size else {}
    return _describe(name, own | arguments, about, {"image_size": size}, list(about.label_names or ()))


def timm_preprocessing(about: PretrainedCfg) -> dict[str, Any]:
    """Return ``ModelInfo.preprocessing`` of a model of timm."""
    found = {"mean": list(about.mean), "std": list(about.std), "image_size": about.input_size[-1]}
    found |= {"crop_pct": about.crop_pct or DEFAULT_CROP_PCT, "crop_mode": about.crop_mode or "center"}
    return found | {"interpolation": about.interpolation}


def _describe(
    name: str, arguments: dict[str, Any], about: PretrainedCfg, said: dict[str, Any], classes: list[str]
) -> ModelInfo:
    kwargs = {key: value for key, value in arguments.items() if key != "num_classes"}
    return ModelInfo(
        "model", name, kwargs, about.num_classes, preprocessing=timm_preprocessing(about) | said, classes=classes
    )


# ---- the arguments of timm's training script -------------------------------------------------------------------------


def _described_by_arguments(file: WeightFile) -> ModelInfo | None:
    """Return what the stored arguments of a training script say: timm's, or another one's that are called the same."""
    given = {key: value for key, value in file.arguments.items() if value not in (None, "")}
    names = (given.get(key) for key in ("arch", "model"))
    name = next((name for name in names if isinstance(name, str) and timm.is_model(name)), None)
    if name is None:
        return None
    arguments = _constructor_arguments(file, given)
    size = arguments.get("img_size", given.get("img_size", given.get("input_size")))
    candidates = {key: given[key] for key in PREPROCESSING if key in given}
    if size is not None:
        candidates["image_size"] = size[-1] if isinstance(size, (list, tuple)) and size else size
    said = {}
    for key, value in candidates.items():
        try:
            said[key] = _as_data_key(key, value)
        except ValidationError as error:
            _warn(file, key, value, error.errors()[0]["msg"])
    if "image_size" in said:
        arguments = image_size_arguments(name, said["image_size"]) | arguments
    return _describe(name, arguments, timm_config(name), said, [])


def _constructor_arguments(file: WeightFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's script passes to the model and what changes the model's answers."""
    arguments = {ours: given[key] for key, ours in (("gp", "global_pool"), ("bn_eps", "bn_eps")) if key in given}
    if given.get("in_chans", 3) != 3:
        arguments["in_chans"] = given["in_chans"]
    more = given.get("model_kwargs", {})
    try:
        return arguments | json.loads(json.dumps(more))
    except (TypeError, ValueError) as error:
        _warn(file, "model_kwargs", more, str(error))
    return arguments


def _as_data_key(key: str, value: Any) -> Any:
    """Return a value as the config's ``data`` has it. Raises ``ValidationError`` for one that it cannot have."""
    if isinstance(value, (list, tuple)):
        value = tuple(value) * (3 if len(value) == 1 else 1)  # timm takes one number for all channels
    value = getattr(DataConfig(root="unused", **{key: value}), key)
    return list(value) if isinstance(value, tuple) else value


def _warn(file: WeightFile, key: str, value: Any, reason: str) -> None:
    log.warning(
        f"{file.path}: its training script's {key} {value!r} cannot be used here ({reason}); the model's own is taken"
    )
