"""Initialise sharded descendants from a learngene, and compare every rank's part with the offline expansion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expansion import gather_and_broadcast
from sws_dist.config.schema import ModelConfig, OptimConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0
from sws_dist.distributed.init import World, init_distributed
from sws_dist.distributed.traffic import count_traffic
from sws_dist.errors import RunError
from sws_dist.learngene.expand import expand_learngene
from sws_dist.learngene.file import load_learngene
from sws_dist.learngene.plan import expansion_plan
from sws_dist.learngene.sharded_init import choose_transfer, init_from_learngene, prepare_expansion
from sws_dist.models import create_model
from sws_dist.zero.engine import build_engine, connect_deepspeed
from sws_dist.zero.partition import fragments, master_weights
from sws_dist.zero.shard_writer import allocate_shards, master_slices

GEOMETRY = {"patch_size": 8, "embed_dim": 36, "num_heads": 3}
SCHEDULE = (3, 3, 4, 3, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_all(learngene_path: Path, cases: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Run every case in one rank, then ``hidden``; return their results."""
    world = init_distributed(120)
    connect_deepspeed()
    return [run(learngene_path, world, **case) for case in cases], hidden(learngene_path, world)


def run(
    path: Path,
    world: World,
    stage: int,
    precision: str,
    mode: str,
    classes: int = 7,
    size: int = 32,
    optimizer: str = "adamw",
    zero: dict[str, Any] | None = None,
    spoil: bool = False,
    learngene: str = "learngene",
) -> dict[str, Any]:
    """Initialise one descendant of 12 layers; return what is wrong with it on any rank, and what moved."""
    path = path.with_name(f"{learngene}.safetensors")
    dtype, layers = DTYPES[precision], expansion_plan(SCHEDULE, 12)
    ds = {
        "train_batch_size": world.size,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    geometry = GEOMETRY | {"img_size": size, "num_classes": classes}
    with torch.device("meta"):
        model = create_model("sws_vit", depth=12, **geometry)
    config = ModelConfig(name="sws_vit", initial_learngene=str(path), expand=mode)
    expansion = prepare_expansion(config, model)
    assert expansion is not None
    allocate_shards(model, ds, world.device, dtype)
    built = build_engine(model, ds, OptimConfig(name=optimizer))
    masters = master_slices(built)
    if spoil:
        masters = {name: master._replace(start=max(0, master.start - 1)) for name, master in masters.items()}
        model.blocks[0].attn.qkv.weight.ds_zero_partition_rank ^= 1
    with count_traffic() as moved:
        report = init_from_learngene(model, masters, expansion, 0, world.device)
    if spoil:
        model.blocks[0].attn.qkv.weight.ds_zero_partition_rank ^= 1

    info, weights = load_learngene(path)
    _, expected = expand_learngene(info, weights, layers, num_classes=classes, image_size=size, seed=0)
    wrong = wrong_parts(built, expected, dtype, world)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = create_model("sws_vit", depth=12, **geometry).eval()
    plain.load_state_dict(expected)
    built.eval()
    with torch.no_grad():
        same = torch.equal(built(images), plain.to(dtype)(images))
    wrong = [name for names in broadcast_from_rank0(gather_on_rank0(wrong)) for name in names]
    with count_traffic() as usual:
        if stage == 3 and precision == "fp32" and not expansion.mapping.fresh and not spoil:
            gather_and_broadcast(model, path, expansion.mapping)
    return {
        "wrong": sorted(set(wrong)),
        "logits_equal": all(broadcast_from_rank0(gather_on_rank0(same))),
        "calls": dict(moved.calls),
        "bytes": moved.total_bytes,
        "file_bytes": sum(broadcast_from_rank0(gather_on_rank0(report.num_bytes))),
        "gather_and_broadcast_bytes": usual.total_bytes,
    }


def scales(path: Path) -> tuple[float, ...]:
    """Return the factors of a descendant's branches whose config asks for them."""
    init_distributed(120)
    with torch.device("meta"):
        model = create_model("sws_vit", depth=10, num_classes=7, img_size=32, **GEOMETRY)
    config = ModelConfig(name="sws_vit", initial_learngene=str(path), kwargs={"branch_scaling": 1.0})
    expansion = prepare_expansion(config, model)
    assert expansion is not None
    return expansion.mapping.scales


def wrong_parts(built: Any, expected: dict[str, Tensor], dtype: torch.dtype, world: World) -> list[str]:
    """Name the parameters of which this rank's master, or its part of the model, is not the offline expansion's."""
    wrong = []
    flats = master_weights(built)
    for piece in fragments(built):
        right = expected[piece.name].reshape(-1)[piece.start : piece.start + piece.numel]
        if not torch.equal(piece.of(flats), right):
            wrong.append(f"master of {piece.name}")
    for name, parameter in built.module.named_parameters():
        right = expected[name].reshape(-1).to(dtype)
        part = parameter.detach().reshape(-1)
        if hasattr(parameter, "ds_tensor"):
            part = parameter.ds_tensor
            start = world.rank * part.numel()
            right = torch.nn.functional.pad(right, (0, part.numel() * world.size - right.numel()))
            right = right[start : start + part.numel()]
        if not torch.equal(part, right):
            wrong.append(name)
    return wrong


def hidden(path: Path, world: World) -> list[str]:
    """Return what is chosen, and then said, where the other ranks see no file, and where they see another one."""
    said = []
    for elsewhere in (path.with_name("nowhere.safetensors"), path.with_name("other.safetensors")):
        mine = path if world.is_rank_zero else elsewhere
        said.append(choose_transfer(mine, "auto")[1])
        try:
            choose_transfer(mine, "read")
        except RunError as error:
            said.append(str(error))
    return said
