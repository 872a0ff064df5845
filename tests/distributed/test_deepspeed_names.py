"""Test that every private name of DeepSpeed that ``sws_dist.zero`` uses exists: an upgrade fails here, with a list."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from sws_dist.zero.engine import BUCKET_REDUCERS
from tests import ranks

ROOT = Path(__file__).parents[2]

# Module -> names, all of them outside DeepSpeed's documented interface.
IMPORTED = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.comm.config": ("CommsLoggerConfig",),
    "deepspeed.monitor.config": ("CometConfig", "CSVConfig", "WandbConfig", "get_monitor_config"),
    "deepspeed.monitor.monitor": ("MonitorMaster",),
    "deepspeed.runtime.precision_config": ("DeepSpeedBF16Config", "DeepSpeedFP16Config"),
    "deepspeed.runtime.zero.config": ("DeepSpeedZeroConfig",),
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper": ("PartitionedParamStatus",),
    "deepspeed.runtime.zero.offload_config": ("OffloadDeviceEnum",),
    "deepspeed.runtime.zero.partition_parameters": ("ZeroParamStatus", "is_zero_param"),
}
# ZeRO stage, precision -> path from the engine (or from a parameter, or zero.Init) -> attributes.
ENGINE = (
    "module optimizer config global_rank device zero_optimization_stage gradient_accumulation_steps "
    "is_gradient_accumulation_boundary was_step_applied get_global_grad_norm allreduce_gradients gradient_clipping "
    "clip_fp32_gradients"
)
FLAT = "single_partition_of_fp32_groups round_robin_bit16_groups round_robin_bit16_offsets partition_size"
LIVE: dict[tuple[int, str], dict[str, str]] = {
    (0, "fp32"): {"engine": ENGINE, "engine.optimizer": "param_groups state"},
    (0, "bf16"): {"engine.optimizer": "fp16_groups optimizer"},
    (1, "bf16"): {
        "engine.optimizer": f"{FLAT} update_lp_params optimizer {BUCKET_REDUCERS[1]}",
    },
    (2, "fp32"): {
        "engine.optimizer": f"{FLAT} update_lp_params {BUCKET_REDUCERS[2]}",
    },
    (3, "bf16"): {
        "engine.optimizer": "fp32_partitioned_groups_flat get_param_id grad_position optimizer "
        "_reassign_or_swap_out_partitioned_parameters checkpoint_event_prologue checkpoint_event_epilogue "
        f"{BUCKET_REDUCERS[3]}",
        "parameter": "ds_tensor ds_numel ds_shape ds_status ds_secondary_tensor ds_zero_partition_rank partition",
        "parameter.ds_tensor": "ds_numel status final_location",
        "init": "mem_efficient_linear _enable_mem_efficient_linear _convert_to_deepspeed_param",
    },
}
ON_GPUS = {"fp16_groups_flat", "ds_quant_scale"}
"""Attributes that only a GPU's optimizers and quantised shards have; the code asks ``hasattr`` first."""


def missing_attributes(stage: int, precision: str) -> list[str]:
    """Build a small engine, and list the expected attributes that it lacks."""
    import deepspeed
    import torch

    from sws_dist.config.schema import OptimConfig
    from sws_dist.distributed.init import init_distributed
    from sws_dist.models import create_model
    from sws_dist.zero.engine import build_engine, connect_deepspeed

    init_distributed(60)
    connect_deepspeed()
    ds: dict[str, Any] = {"train_batch_size": 1, "zero_allow_untested_optimizer": True}
    ds |= {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    model = create_model("sws_vit", schedule=[2, 1], img_size=32, patch_size=16, embed_dim=32, num_heads=2)
    engine = build_engine(model, ds, OptimConfig())
    roots = {"engine": engine, "parameter": next(engine.module.parameters())}
    if stage == 3:
        roots["init"] = deepspeed.zero.Init(config_dict_or_path=ds)
    missing = []
    for path, names in LIVE[stage, precision].items():
        first, *rest = path.split(".")
        owner: Any = roots[first]
        for name in rest:
            owner = getattr(owner, name)
        missing += [f"{path}.{name}" for name in names.split() if not hasattr(owner, name)]
    assert isinstance(roots["parameter"], torch.Tensor)
    return missing


@pytest.mark.parametrize(("stage", "precision"), LIVE)
def test_engines_have_the_attributes_that_we_use(stage: int, precision: str) -> None:
    assert ranks.run(missing_attributes, stage, precision, world=1) == [[]]


def test_modules_have_the_names_that_we_import() -> None:
    missing = [
        f"{module}.{name}"
        for module, names in IMPORTED.items()
        for name in names
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


def test_the_lists_above_are_complete() -> None:
    """Every attribute of DeepSpeed's parameters, and every private one, that zero/ touches is checked above."""
    listed = {name for checks in LIVE.values() for names in checks.values() for name in names.split()} | ON_GPUS
    torchs = {"_parameters", "_foreach_lerp_", "_foreach_norm"}
    for path in (ROOT / "sws_dist" / "zero").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private or node.attr.startswith("ds_"):
                    assert node.attr in listed | torchs, f"{path.name} uses {node.attr}"
