"""Load, check and resolve the DeepSpeed JSON, which says how a run is sharded. Imports no torch and no DeepSpeed.

DeepSpeed accepts unknown top-level keys and ``"auto"`` without a word, clips gradients at 1.0 unless told
otherwise, and lets its JSON overrule the trainer's optimizer. Here each fact has one owner: the JSON holds the
keys of ``HONOURED``, the run config holds the rest, and what belongs to neither is refused with the reason.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sws_dist.config.schema import MAX_BATCH, RunConfig
from sws_dist.config.shipped import find_deepspeed_config
from sws_dist.errors import ConfigError
from sws_dist.text import read_text

MONITORS = ("wandb", "csv_monitor", "comet")
"""DeepSpeed's own ways to follow a run; ``monitor.py`` feeds them."""

HONOURED = {
    *MONITORS,
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "communication_data_type",
    "wall_clock_breakdown",
}

REFUSED = {
    "train_batch_size": "set train.global_batch in the run config",
    "optimizer": "set optim.* in the run config",
    "scheduler": "set optim.* in the run config; the schedule is part of the recipe",
    "tensorboard": "the trainer writes TensorBoard events to OUTPUT/tensorboard by itself",
    "activation_checkpointing": "set model.grad_checkpointing in the run config",
    "elasticity": "DeepSpeed 0.19 has no elastic mode any more",
    "steps_per_print": "set train.log_every in the run config",
    "aio": "offloading to NVMe is not supported; offload to the cpu",
    "comms_logger": "nothing would show its counts; sws plan counts a step's traffic, time/reduce is its time",
    "flops_profiler": "metrics.json holds the FLOPs; DeepSpeed's profiler is wrong under ZeRO-3",
}

_OUR_LEAVES = "the trainer marks its own stages as leaf modules; a block marked so asserts, or gives wrong gradients"
_OUR_CHECKPOINTS = "checkpoints are the trainer's own and fit any world size and ZeRO stage"
_OLD = "use zero_optimization.offload_param and zero_optimization.offload_optimizer"
_MASTERS = "the trainer keeps fp32 masters (moving average, checkpoints, exact expansion)"

REFUSED_INSIDE = {  # what DeepSpeed accepts in a group, and what cannot be right here
    "zero_optimization": {
        "leaf_module": _OUR_LEAVES,
        "module_granularity_threshold": f"{_OUR_LEAVES}; on a CPU it crashes",
        "elastic_checkpoint": _OUR_CHECKPOINTS,
        "load_from_fp32_weights": _OUR_CHECKPOINTS,
        "pipeline_loading_checkpoint": _OUR_CHECKPOINTS,
        "gather_16bit_weights_on_model_save": "sws convert writes a checkpoint's weights",
        "gather_fp16_weights_on_model_save": "sws convert writes a checkpoint's weights",
        "legacy_stage1": "that implementation is gone",
        "cpu_offload": _OLD,
        "cpu_offload_param": _OLD,
        "cpu_offload_use_pin_memory": _OLD,
        "zenflow": f"it updates weights behind the optimizer's back; {_MASTERS}",
    },
    "zero_optimization.offload_optimizer": {
        "super_offload": f"it keeps the masters in a process of its own; {_MASTERS}",
        "ratio": "DeepSpeed's second optimizer, which steps what stays on the GPU, keeps a learning rate of its own; "
        "offload all of it",
    },
    "bf16": {"bf16_master_weights_and_grads": _MASTERS, "bf16_optimizer_states": _MASTERS},
    "fp16": {"fp16_master_weights_and_grads": _MASTERS},
    "comet": {"api_key": "it would be written into the run's folder; set COMET_API_KEY in the environment"},
}

GROUPS = ("zero_optimization", "bf16", "fp16", *MONITORS)
DATA_TYPES = ("fp32", "fp16", "bf16")
STAGES = (0, 1, 2, 3)
ZERO3_PREFIX = "stage3_"  # DeepSpeed takes these keys with and without it


def resolve_deepspeed_config(
    source: str | Path | Mapping[str, Any], config: RunConfig, world_size: int
) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize(config=...)``, checked against the run config.

    Of micro batch and accumulation the JSON may give both, one or none (then accumulation is 1); what is missing
    follows from ``train.global_batch = micro batch x accumulation x world size``.

    Raises:
        ConfigError: naming the key, the file and what would be right.
    """
    ds, path = load_deepspeed_config(source), config_source(source)
    zero = ds["zero_optimization"]
    if config.model.compile and zero["stage"] == 3:
        raise ConfigError(f"{path}: model.compile does not work under ZeRO-3; use stage 0, 1 or 2, or leave it off")
    _check_zero3_only(zero, path, world_size)
    if config.model.cuda_graphs and zero["stage"] == 3:
        raise ConfigError(
            f"{path}: model.cuda_graphs does not work under ZeRO-3, which frees and gathers the weights that a graph "
            "finds by their address; use stage 0, 1 or 2, or leave it off"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if offload and zero["stage"] == 0:
        raise ConfigError(
            f"{path}: offload_optimizer does nothing at stage 0; it needs zero_optimization.stage 1, 2 or 3"
        )
    if offload and config.optim.name != "cpu_adam":
        raise ConfigError(
            f"{path}: offload_optimizer needs optim.name: cpu_adam, not {config.optim.name} "
            "(add --set optim.name=cpu_adam)"
        )
    if config.optim.name == "cpu_adam" and zero["stage"] == 3 and not offload:
        raise ConfigError(f"{path}: optim.name: cpu_adam under ZeRO-3 needs zero_optimization.offload_optimizer")
    _check_nonfinite(ds, path, config.train.skip_nonfinite)
    ds.update(_batch(ds, path, config.train.global_batch, world_size))
    require_whole_images(ds["train_micro_batch_size_per_gpu"], config.augment.num_crops)
    ds.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default is 1.0
    ds["zero_allow_untested_optimizer"] = True
    ds["steps_per_print"] = 10**9  # the trainer prints
    return ds


def config_source(source: str | Path | Mapping[str, Any]) -> str:
    """Return what messages call a DeepSpeed config: its file, if it has one."""
    return "deepspeed_config" if isinstance(source, Mapping) else str(find_deepspeed_config(source))


def load_deepspeed_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; ``zero_optimization.stage`` is always there afterwards.

    Args:
        source: a file, the name of a config that ships with this package (``zero2_bf16``), or its content.
    """
    path = config_source(source)
    text = json.dumps(dict(source)) if isinstance(source, Mapping) else _read(path)
    try:
        ds = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        is_comma_too_many = text[: error.pos].rstrip().endswith(",") and text[error.pos :][:1] in ("}", "]")
        problem = "a comma before the closing bracket" if is_comma_too_many else error.msg
        problem = problem if text.strip() else "the file is empty"
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from None
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
    _check_top_level(ds, path)
    zero = ds.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or zero.setdefault("stage", 0) not in STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be one of {STAGES}, not {zero!r}")
    for group, refused in REFUSED_INSIDE.items():
        for key in _group(ds, group, path):
            if (reason := refused.get(key.removeprefix(ZERO3_PREFIX))) is not None:
                raise ConfigError(f"{path}: {group}.{key}: not here: {reason}")
    for key in ("offload_param", "offload_optimizer"):
        if _group(zero, key, path).get("device") == "nvme":
            raise ConfigError(
                f"{path}: zero_optimization.{key}.device: nvme is not supported: moving average, checkpoints and "
                "expansion need the masters in memory; offload to the cpu"
            )
    if all(ds.get(p, {}).get("enabled") for p in ("bf16", "fp16")):
        raise ConfigError(f"{path}: bf16 and fp16 are both enabled; choose one")
    return ds


def _check_top_level(ds: dict[str, Any], path: str | Path) -> None:
    """Check the values that DeepSpeed has no model for, and that its groups are groups."""
    for group in GROUPS:
        _group(ds, group, path)
    clipping, data_type = ds.get("gradient_clipping", 0.0), ds.get("communication_data_type", "fp32")
    if type(clipping) not in (int, float) or not 0 <= clipping < math.inf:
        raise ConfigError(
            f"{path}: gradient_clipping = {clipping!r}: expected the largest norm of the gradient, a number above 0; 0 "
            "for no clipping"
        )
    if data_type not in DATA_TYPES:
        raise ConfigError(f"{path}: communication_data_type = {data_type!r}: expected one of {', '.join(DATA_TYPES)}")
    if type(breakdown := ds.get("wall_clock_breakdown", False)) is not bool:
        raise ConfigError(f"{path}: wall_clock_breakdown = {breakdown!r}: expected true or false")


def set_zero3_memory_defaults(zero: dict[str, Any], stage_numel: int) -> None:
    """Complete a ZeRO-3 group from the size of one stage of shared layers, so that few stages are whole at a time.

    DeepSpeed's own defaults keep a model of up to a billion parameters whole on every rank. Keys that the user gives
    stay.
    """
    settings = {
        "param_persistence_threshold": 0,  # a leaf module's parameters are gathered in one call: no small ones to save
        "max_reuse_distance": 2 * stage_numel,  # where forward turns into backward, the last stage stays
        "max_live_parameters": 3 * stage_numel,
        "prefetch_bucket_size": stage_numel,  # the next stage while one computes
    }
    for key, value in settings.items():
        if key not in zero:
            zero.setdefault(ZERO3_PREFIX + key, value)


def _check_zero3_only(zero: dict[str, Any], path: str | Path, world_size: int) -> None:
    """Refuse keys that DeepSpeed ignores below stage 3, and a partition that does not divide the world."""
    group = zero.get("zero_hpz_partition_size", 1)
    quantised = any(zero.get(f"zero_quantized_{what}") for what in ("weights", "nontrainable_weights", "gradients"))
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    if zero["stage"] < 3 and (quantised or offloaded or group != 1):
        raise ConfigError(
            f"{path}: offload_param, zero_hpz_partition_size and zero_quantized_* do nothing at stage "
            f"{zero['stage']}; they need zero_optimization.stage 3"
        )
    if type(group) is int and (group < 1 or world_size % group):
        raise ConfigError(
            f"{path}: zero_optimization.zero_hpz_partition_size {group} does not divide the {world_size} ranks; it is "
            "usually the number of GPUs in a node"
        )


def _check_nonfinite(ds: dict[str, Any], path: str | Path, limit: int) -> None:
    """Check that steps which are to be skipped can be found."""
    finds_overflow = ds.get("bf16", {}).get("check_grad_overflow", True)
    if limit and not (ds["zero_optimization"].get("compute_grad_norm", True) and finds_overflow):
        raise ConfigError(
            f"train.skip_nonfinite {limit}: {path} turns off what finds such gradients "
            "(compute_grad_norm, check_grad_overflow)"
        )


def require_whole_images(micro_batch: int, num_crops: int) -> None:
    """Raise ConfigError if a micro-batch does not hold all crops of each of its images."""
    if micro_batch % num_crops:
        raise ConfigError(
            f"augment.num_crops {num_crops}: a micro-batch of {micro_batch} images (train.global_batch / (ranks x "
            "accumulation)) is no multiple of it, and all crops of an image come in one micro-batch"
        )


def _group(ds: dict[str, Any], dotted: str, path: str | Path) -> dict[str, Any]:
    """Return the JSON object under a dotted key; empty where there is none."""
    found: Any = ds
    for key in dotted.split("."):
        found = found.get(key, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: {dotted}: expected a JSON object, found {found!r}")
    return found


def precision_of(ds: dict[str, Any]) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``: the dtype of the model under this DeepSpeed config."""
    return next((p for p in ("bf16", "fp16") if ds.get(p, {}).get("enabled")), "fp32")


def _read(path: str) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path}: {error.strerror}") from None


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
    """Complete micro batch and accumulation, and check global batch = micro batch x accumulation x ranks."""
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
    if micro > MAX_BATCH:
        raise ConfigError(
            f"{path}: {micro_key} {micro} is more than the {MAX_BATCH} images that are decoded as one batch; raise "
            f"{steps_key}"
        )
    return {micro_key: micro, steps_key: steps, "train_batch_size": global_batch}
