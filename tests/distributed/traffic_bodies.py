"""Count the collectives of a training step at every ZeRO stage."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.init import World, init_distributed
from sws_dist.distributed.traffic import Traffic, count_traffic
from sws_dist.models import create_model
from sws_dist.zero import engine
from sws_dist.zero.config import set_zero3_memory_defaults
from sws_dist.zero.engine import build_engine, connect_deepspeed

GEOMETRY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
AUXILIARY, DESCENDANT = {"schedule": (3, 3, 4, 3, 3)}, {"depth": 12}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"auxiliary, ZeRO-{stage}": (AUXILIARY, {"stage": stage}) for stage in range(4)},
    **{f"auxiliary, ZeRO-{stage}, two micro-batches": (AUXILIARY, {"stage": stage, "micros": 2}) for stage in range(4)},
    "auxiliary, ZeRO-3, checkpointing": (AUXILIARY, {"stage": 3, "checkpointing": True}),
    "auxiliary, ZeRO-3, no leaves": (AUXILIARY, {"stage": 3, "leaves": False}),
    "auxiliary, ZeRO-3, DeepSpeed's defaults": (AUXILIARY, {"stage": 3, "lean": False}),
    "descendant, ZeRO-3": (DESCENDANT, {"stage": 3}),
}


def count() -> dict[str, Any]:
    """Count every case, and collectives whose sizes are plain to see, in one rank."""
    world = init_distributed(120)
    connect_deepspeed()
    return {"known": known(world)} | {name: step(world, model, **how) for name, (model, how) in CASES.items()}


def known(world: World) -> dict[str, Any]:
    """Count collectives whose sizes are plain to see."""
    with count_traffic() as outer:
        dist.all_reduce(torch.ones(10))
        with count_traffic() as inner:
            dist.broadcast(torch.ones(3, dtype=torch.bfloat16), src=0)
            dist.all_gather([torch.empty(4) for _ in range(world.size)], torch.ones(4))
        dist.barrier()
    dist.all_reduce(torch.ones(10))  # outside: not counted
    return {"outer": as_json(outer), "inner": as_json(inner)}


def step(
    world: World,
    model: dict[str, Any],
    stage: int,
    micros: int = 1,
    checkpointing: bool = False,
    leaves: bool = True,
    lean: bool = True,
) -> dict[str, Any]:
    """Count the third step: in the first ones DeepSpeed records which parameters are fetched when."""
    student = create_model("sws_vit", **model, **GEOMETRY)
    student.set_grad_checkpointing(checkpointing)
    num_bytes = 4 * sum(p.numel() for p in student.parameters())
    ds: dict[str, Any] = {
        "train_batch_size": 4 * micros * world.size,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if stage == 3 and lean:
        set_zero3_memory_defaults(ds["zero_optimization"], sum(p.numel() for p in student.blocks[0].parameters()))
    with mock.patch.object(engine, "Stage", engine.Stage if leaves else type(None)):
        built = build_engine(student, ds, OptimConfig())
    for _ in range(3):
        passes: dict[str, list[Traffic]] = {"forward": [], "backward": [], "step": []}
        for _ in range(micros):
            with count_traffic() as forward:
                out = built(torch.randn(4, 3, 32, 32))
            with count_traffic() as backward:
                built.backward(out.square().mean())
            with count_traffic() as update:
                built.step()
            for name, moved in zip(passes, (forward, backward, update), strict=True):
                passes[name].append(moved)
    return {"model_bytes": num_bytes, **{name: [as_json(m) for m in moved] for name, moved in passes.items()}}


def as_json(moved: Traffic) -> dict[str, Any]:
    return {"calls": dict(moved.calls), "bytes": dict(moved.bytes)}
