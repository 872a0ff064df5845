"""Fill descendants from a learngene and compare every rank's part with the offline expansion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expansion import gather_and_broadcast
from sws_dist import comm, engine, expansion, filling, learngene
from sws_dist.comm import World
from sws_dist.config import OptimConfig
from sws_dist.errors import RunError
from sws_dist.models import create_model
from sws_dist.traffic import counted

GEOMETRY = {"patch_size": 8, "embed_dim": 36, "num_heads": 3}
SCHEDULE = (3, 3, 4, 3, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_all(learngene_path: Path, cases: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Run every case in one rank, then ``hidden``; what they return."""
    world = comm.init(120)
    return [run(learngene_path, world, **case) for case in cases], hidden(learngene_path, world)


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
    """Fill one descendant of 12 layers; return what is wrong with it on any rank, and what moved."""
    dtype, layers = DTYPES[precision], expansion.plan(SCHEDULE, 12)
    ds = {
        "train_batch_size": world.size,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    geometry = GEOMETRY | {"img_size": size, "num_classes": classes}
    header, chosen = filling.choose(path, way)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = create_model("sws_vit", depth=12, **geometry)
    design = expansion.design(header.info, header.shapes, model, layers)
    fresh = expansion.fresh_head(model, seed=0) if design.fresh else {}
    filling.allocate(model, ds, world.device, dtype)
    built = engine.build(model, ds, OptimConfig(name=optimizer))  # type: ignore[arg-type]
    masters = filling.own_masters(built)
    if spoil:
        masters = {name: master._replace(start=max(0, master.start - 1)) for name, master in masters.items()}
        model.blocks[0].attn.qkv.weight.ds_zero_partition_rank ^= 1
    with counted() as moved:
        if chosen == "read":
            filled = filling.read_into(model, path, header, design, fresh, masters)
        else:
            filled = filling.broadcast_into(model, path, header, design, fresh, masters, world.device)
    if spoil:
        model.blocks[0].attn.qkv.weight.ds_zero_partition_rank ^= 1

    info, weights = learngene.load(path)
    _, expected = expansion.expand(info, weights, layers, num_classes=classes, image_size=size, seed=0)
    wrong = wrong_parts(built, expected, dtype, world)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = create_model("sws_vit", depth=12, **geometry).eval()
    plain.load_state_dict(expected)
    built.eval()
    with torch.no_grad():
        same = torch.equal(built(images), plain.to(dtype)(images))
    wrong = [name for names in comm.from_main(comm.gather_to_main(wrong)) for name in names]
    with counted() as usual:
        if stage == 3 and precision == "fp32" and not fresh and not spoil:
            gather_and_broadcast(model, path, design)
    return {
        "wrong": sorted(set(wrong)),
        "logits_equal": all(comm.from_main(comm.gather_to_main(same))),
        "calls": dict(moved.calls),
        "bytes": moved.total_bytes,
        "file_bytes": sum(comm.from_main(comm.gather_to_main(filled.num_bytes))),
        "gather_and_broadcast_bytes": usual.total_bytes,
    }


def wrong_parts(built: Any, expected: dict[str, Tensor], dtype: torch.dtype, world: World) -> list[str]:
    """Name the parameters of which this rank's master, or its part of the model, is not the offline expansion's."""
    wrong = []
    flats = engine.masters(built)
    for piece in engine.fragments(built):
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
        mine = path if world.is_main else elsewhere
        said.append(filling.choose(mine, "auto")[1])
        try:
            filling.choose(mine, "read")
        except RunError as error:
            said.append(str(error))
    return said
