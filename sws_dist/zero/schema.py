"""Check a DeepSpeed JSON against DeepSpeed's own models: keys and types inside its groups, and what a device can do.

``config.py`` decides what belongs into the JSON and imports no DeepSpeed; this module asks DeepSpeed itself, so that
no list of its keys has to be kept here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.config import CometConfig, CSVConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from sws_dist.errors import ConfigError
from sws_dist.zero.config import precision_of

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}


def check_against_deepspeed(ds: dict[str, Any], path: str | Path, device: torch.device) -> None:
    """Raise ConfigError for a key or a value that DeepSpeed does not take, or that ``device`` cannot run."""
    for group, model in MODELS.items():
        try:
            model(**ds.get(group, {}))
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(e, group, model, path) for e in error.errors())) from None
    if device.type == "cuda":
        return
    if precision_of(ds) == "fp16":
        raise ConfigError(f"{path}: fp16 needs a GPU; use bf16, or leave both out for fp32")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if ds["zero_optimization"].get(key):
            raise ConfigError(f"{path}: zero_optimization.{key} needs a GPU: DeepSpeed quantises with CUDA kernels")


def _explain(error: Any, group: str, model: type[BaseModel], path: str | Path) -> str:
    keys = [str(part) for part in error["loc"]]
    dotted = ".".join([group, *keys])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _names(model, keys[:-1]), n=1)
        return f"{path}: unknown key {dotted}" + (f"; did you mean {near[0]}?" if near else "")
    message = error["msg"]
    return f"{path}: {dotted} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _names(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Return the keys that ``model`` takes under ``parents``."""
    for parent in parents:
        field = model.model_fields[parent]
        inner = (field.annotation, *getattr(field.annotation, "__args__", ()))
        model = next(t for t in inner if isinstance(t, type) and issubclass(t, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]
