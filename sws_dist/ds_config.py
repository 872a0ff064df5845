"""How a run is sharded: load, check and resolve the DeepSpeed JSON. Pure: no torch, no DeepSpeed.

DeepSpeed accepts unknown top-level keys and ``"auto"`` without a word, clips gradients at 1.0 unless told
otherwise, and lets its JSON overrule the trainer's optimizer. Here each fact has one owner: the JSON holds the
keys of ``HONOURED``, the run config holds the rest, and what belongs to neither is refused with the reason.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from sws_dist.config import RunConfig
from sws_dist.errors import ConfigError

HONOURED = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
    "aio",
}

REFUSED = {
    "train_batch_size": "set train.global_batch in the run config",
    "optimizer": "set optim.* in the run config",
    "scheduler": "set optim.* in the run config; the schedule is part of the recipe",
    "tensorboard": "the trainer writes TensorBoard events to OUTPUT/tensorboard by itself",
    "activation_checkpointing": "set model.grad_checkpointing in the run config",
    "elasticity": "DeepSpeed 0.19 has no elastic mode any more",
    "steps_per_print": "set train.log_every in the run config",
    "flops_profiler": "metrics.json holds the FLOPs; DeepSpeed's profiler is wrong under ZeRO-3",
}

STAGES = (0, 1, 2, 3)


def resolve(path: str | Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize(config=...)``.

    Of micro batch and accumulation the JSON may give both, one or none (then accumulation is 1); what is missing
    follows from ``train.global_batch = micro batch x accumulation x world size``.

    Raises:
        ConfigError: naming the key, the file and what would be right.
    """
    ds = load(path)
    zero = ds["zero_optimization"]
    if config.model.compile and zero["stage"] == 3:
        raise ConfigError(f"{path}: model.compile does not work under ZeRO-3; use stage 0, 1 or 2, or leave it off")
    if config.model.cuda_graphs and zero["stage"] == 3:
        raise ConfigError(
            f"{path}: model.cuda_graphs does not work under ZeRO-3, which frees and gathers the weights that a graph "
            "finds by their address; use stage 0, 1 or 2, or leave it off"
        )
    if config.model.cuda_graphs and config.model.compile:
        raise ConfigError(
            "model.cuda_graphs: torch.compile (model.compile) cannot see into a CUDA graph; set one of the two to false"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if offload and config.optim.name != "cpu_adam":
        raise ConfigError(
            f"{path}: offload_optimizer needs optim.name: cpu_adam, not {config.optim.name} "
            "(add --set optim.name=cpu_adam)"
        )
    if config.optim.name == "cpu_adam" and zero["stage"] == 3 and not offload:
        raise ConfigError(f"{path}: optim.name: cpu_adam under ZeRO-3 needs zero_optimization.offload_optimizer")
    ds.update(_batch(ds, path, config.train.global_batch, world_size))
    ds.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default is 1.0
    ds["zero_allow_untested_optimizer"] = True
    ds["steps_per_print"] = 10**9  # the trainer prints
    return ds


def load(path: str | Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; ``zero_optimization.stage`` is always there afterwards."""
    try:
        ds = json.loads(Path(path).read_text(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(ds, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(ds).__name__}")
    for key in ds:
        if key in REFUSED:
            raise ConfigError(f"{path}: {key} is not read from here; {REFUSED[key]}")
        if key not in HONOURED:
            near = difflib.get_close_matches(key, sorted(HONOURED), n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(sorted(HONOURED))}"
            raise ConfigError(f"{path}: unknown key {key}; {hint}")
    _refuse_auto(ds, path)
    zero = ds.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or zero.setdefault("stage", 0) not in STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be one of {STAGES}, not {zero!r}")
    if all(ds.get(p, {}).get("enabled") for p in ("bf16", "fp16")):
        raise ConfigError(f"{path}: bf16 and fp16 are both enabled; choose one")
    return ds


def precision(ds: dict[str, Any]) -> str:
    """``fp32``, ``bf16`` or ``fp16``: the dtype of the model under this DeepSpeed config."""
    return next((p for p in ("bf16", "fp16") if ds.get(p, {}).get("enabled")), "fp32")


def _unique(pairs: list[tuple[str, Any]], path: str | Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{path}: the key {key!r} appears twice; remove one")
    return dict(pairs)


def _refuse_auto(value: Any, path: str | Path, key: str = "") -> None:
    if value == "auto":
        raise ConfigError(f'{path}: {key} is "auto", which DeepSpeed does not resolve; leave the key out instead')
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_auto(inner, path, f"{key}.{name}" if key else name)


def _batch(ds: dict[str, Any], path: str | Path, global_batch: int, world_size: int) -> dict[str, int]:
    micro_key, steps_key = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for key in (micro_key, steps_key):
        if key in ds and (type(ds[key]) is not int or ds[key] < 1):
            raise ConfigError(f"{path}: {key} = {ds[key]!r} must be a whole number above 0")
    if global_batch % world_size:
        raise ConfigError(
            f"train.global_batch = {global_batch} cannot be shared evenly by {world_size} ranks; "
            f"the nearest that can is {max(1, round(global_batch / world_size)) * world_size}"
        )
    per_rank = global_batch // world_size
    micro, steps = ds.get(micro_key), ds.get(steps_key)
    if micro is None:
        steps = steps or 1
        micro = per_rank // steps
    steps = steps or max(1, per_rank // micro)
    if micro * steps != per_rank:
        raise ConfigError(
            f"{path}: {micro_key} {micro} x {steps_key} {steps} x {world_size} ranks = {micro * steps * world_size} "
            f"images a step, but train.global_batch is {global_batch}; change one of them"
        )
    return {micro_key: micro, steps_key: steps, "train_batch_size": global_batch}
