"""Fill descendants from a learngene in one group of ranks and compare every rank's part with the offline expansion.

    deepspeed --num_accelerators 2 --module tests.distributed.filling_worker cases.json

cases.json: {"learngene": FILE, "out": FILE, "cases": [{"stage": 3, "precision": "bf16", "way": "read", ...}, ...]}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expansion import gather_and_broadcast
from sws_dist.cli.common import run_command
from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0
from sws_dist.distributed.init import World, close_distributed, init_distributed
from sws_dist.distributed.traffic import count_traffic
from sws_dist.errors import RunError
from sws_dist.learngene.expand import expand_learngene, fresh_head, map_weights
from sws_dist.learngene.file import load_learngene
from sws_dist.learngene.plan import expansion_plan
from sws_dist.learngene.sharded_init import choose_transfer, init_by_broadcast, init_by_reading
from sws_dist.models import create_model
from sws_dist.zero.engine import build_engine
from sws_dist.zero.partition import fragments, master_weights
from sws_dist.zero.shard_writer import allocate_shards, master_slices

GEOMETRY = {"patch_size": 8, "embed_dim": 36, "num_heads": 3}
SCHEDULE = (3, 3, 4, 3, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    jobs = json.loads(parser.parse_args().jobs.read_text())
    world = init_distributed(120)
    found = [run(Path(jobs["learngene"]), world, **case) for case in jobs["cases"]]
    found.append(hidden(Path(jobs["learngene"]), world))
    if world.is_main:
        Path(jobs["out"]).write_text(json.dumps(found))
    close_distributed()


def run(
    path: Path,
    world: World,
    stage: int,
    precision: str,
    way: str,
    classes: int = 7,
    size: int = 32,
    optimizer: str = "adamw",
    zero: dict[str, Any] | None = None,
    spoil: bool = False,
) -> dict[str, Any]:
    """One descendant of 12 layers; what was wrong with it on any rank, and what moved."""
    dtype, layers = DTYPES[precision], expansion_plan(SCHEDULE, 12)
    ds = {
        "train_batch_size": world.size,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    geometry = GEOMETRY | {"img_size": size, "num_classes": classes}
    header, chosen = choose_transfer(path, way)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = create_model("sws_vit", depth=12, **geometry)
    design = map_weights(header.info, header.shapes, model, layers)
    fresh = fresh_head(model, seed=0) if design.fresh else {}
    allocate_shards(model, ds, world.device, dtype)
    built = build_engine(model, ds, OptimConfig(name=optimizer))  # type: ignore[arg-type]
    masters = master_slices(built)
    if spoil:
        masters = {name: master._replace(start=max(0, master.start - 1)) for name, master in masters.items()}
        model.blocks[0].attn.qkv.weight.ds_zero_partition_rank ^= 1
    with count_traffic() as moved:
        if chosen == "read":
            filled = init_by_reading(model, path, header, design, fresh, masters)
        else:
            filled = init_by_broadcast(model, path, header, design, fresh, masters, world.device)
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
        if stage == 3 and precision == "fp32" and not fresh and not spoil:
            gather_and_broadcast(model, path, design)
    return {
        "wrong": sorted(set(wrong)),
        "logits_equal": all(broadcast_from_rank0(gather_on_rank0(same))),
        "calls": dict(moved.calls),
        "bytes": moved.total_bytes,
        "file_bytes": sum(broadcast_from_rank0(gather_on_rank0(filled.num_bytes))),
        "gather_and_broadcast_bytes": usual.total_bytes,
    }


def wrong_parts(built: Any, expected: dict[str, Tensor], dtype: torch.dtype, world: World) -> list[str]:
    """Parameters of which this rank's master, or its part of the model, is not the offline expansion's."""
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


def hidden(path: Path, world: World) -> dict[str, Any]:
    """Where only rank 0 sees the file, or the others another one."""
    said = []
    for elsewhere in (path.with_name("nowhere.safetensors"), path.with_name("other.safetensors")):
        mine = path if world.is_main else elsewhere
        said.append(choose_transfer(mine, "auto")[1])
        try:
            choose_transfer(mine, "read")
        except RunError as error:
            said.append(str(error))
    return {"said": said}


if __name__ == "__main__":
    run_command(main)
