"""Measure how a learngene becomes a sharded descendant: memory of each rank, and what goes over the wire.

    python benchmarks/expansion.py [--ranks 4] [--only CASE] [--out results.json]

`memory`: a descendant of 1 billion parameters (width 2048, 20 layers, bf16) under ZeRO-3, up to its weights being in
their shards, by each way in processes of its own. Each rank's figure is its peak (VmHWM) from start to end; beside it
stand what the process needed before (Python, torch, DeepSpeed, the process group), its shard and the largest tensor.
`usual` is what a user of DeepSpeed does: build the model on every rank, load the expanded weights on rank 0, hand it to
zero.Init. That needs the whole model on every rank, so it is measured at a quarter of the size, beside ours.

`traffic`: a ViT-B of 12 layers from 5 (fp32), all ways in one run: bytes given to the process groups, and whether the
logits equal, bit for bit, those of the descendant that launcher/expand.py would have written, computed with the same
linear layers: under ZeRO-3 DeepSpeed puts its own in the place of PyTorch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.checkpoint.weight_file import load_tensors
from sws_dist.config.schema import ModelConfig, OptimConfig
from sws_dist.distributed.collectives import gather_on_rank0
from sws_dist.distributed.init import World, close_distributed, init_distributed
from sws_dist.distributed.traffic import Traffic, count_traffic
from sws_dist.learngene.expand import WeightMapping, expand_learngene
from sws_dist.learngene.file import describe_model, load_learngene
from sws_dist.learngene.plan import expansion_plan
from sws_dist.learngene.sharded_init import Expansion, init_from_learngene, prepare_expansion
from sws_dist.models import SWSVisionTransformer, create_model
from sws_dist.provenance import collect_provenance
from sws_dist.zero.engine import build_engine, connect_deepspeed
from sws_dist.zero.shard_writer import allocate_shards, master_slices

SCHEDULE = (3, 3, 4, 3, 3)
BASE = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "num_classes": 1000}
WIDE = {"img_size": 224, "patch_size": 14, "embed_dim": 2048, "num_heads": 32, "num_classes": 1000}
CASES: dict[str, tuple[str | None, int]] = {"traffic": (None, 12)} | {
    f"memory: {way}, {layers} layers": (way, layers)
    for way, layers in (("read", 20), ("broadcast", 20), ("read", 5), ("broadcast", 5), ("usual", 5))
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", choices=CASES, action="append", help="one case; repeatable (default: all)")
    parser.add_argument("--out", type=Path, help="write the results here as JSON; cases that it has stay as they are")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)  # what the parent asks of its ranks
    args = parser.parse_args()
    if args.rank_of:
        name, folder = args.rank_of
        way, layers = CASES[name]
        result = traffic(Path(folder)) if way is None else memory(way, layers, Path(folder))
        if dist.get_rank() == 0:
            (Path(folder) / "result.json").write_text(json.dumps(result))
        close_distributed()
        return
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for name in args.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_learngene(Path(folder), *((BASE, torch.float32) if name == "traffic" else (WIDE, torch.bfloat16)))
            found = on_ranks(args.ranks, name, folder)
        print(name, json.dumps(found))
        results[name] = collect_provenance() | {"ranks": args.ranks} | found
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n")


def on_ranks(ranks: int, name: str, folder: str) -> dict[str, Any]:
    """Run this file as ``ranks`` processes. Returns what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    subprocess.run([*command, "--rank-of", name, folder], check=True)
    return json.loads((Path(folder) / "result.json").read_text())


def write_learngene(folder: Path, geometry: dict[str, Any], dtype: torch.dtype) -> None:
    """Write random numbers in a learngene's shapes: their values do not matter here."""
    with torch.device("meta"):
        model = create_model("sws_vit", schedule=SCHEDULE, **geometry)
    info = describe_model(model, "learngene", preprocessing={"image_size": geometry["img_size"]})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(p.shape, dtype=dtype).normal_(std=0.02, generator=generator)
        for name, p in model.named_parameters()
    }
    save_model_file(folder / "learngene.safetensors", info, weights)


def zero3(world: World, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_batch_size": world.size,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
    }


def plan(path: Path, mode: Any, geometry: dict[str, Any], layers: int) -> tuple[SWSVisionTransformer, Expansion]:
    with torch.device("meta"):
        model = create_model("sws_vit", depth=layers, **geometry)
    expansion = prepare_expansion(ModelConfig(name="sws_vit", initial_learngene=str(path), expand=mode), model)
    assert expansion is not None
    return model, expansion


def connect() -> World:
    world = init_distributed(600)
    connect_deepspeed()
    return world


# ---- memory ----


def memory(way: str, layers: int, folder: Path) -> dict[str, Any]:
    world, dtype = connect(), torch.bfloat16
    ds, path = zero3(world, dtype), folder / "learngene.safetensors"
    model, expansion = plan(path, "broadcast" if way == "usual" else way, WIDE, layers)
    tensors = [p.numel() * dtype.itemsize for p in model.parameters()]
    before = peak_bytes()
    if way == "usual":
        model = built_everywhere(path, expansion.mapping, layers, ds, dtype)
    else:
        allocate_shards(model, ds, world.device, dtype)
        init_from_learngene(model, {}, expansion, 0, world.device)
    peaks = gather_on_rank0((peak_bytes(), before))
    wrong = gather_on_rank0(wrong_shards(model, path, expansion.mapping))
    shard = sum(p.ds_tensor.numel() for p in model.parameters()) * dtype.itemsize
    needed = [own_before + shard + max(tensors) for _, own_before in peaks or ()]
    return {
        "way": way,
        "layers": layers,
        "parameters": sum(tensors) // dtype.itemsize,
        "model_bytes": sum(tensors),
        "shard_bytes": shard,
        "largest_tensor_bytes": max(tensors),
        "process_bytes": [own_before for _, own_before in peaks or ()],
        "peak_bytes": [peak for peak, _ in peaks or ()],
        "peak_over_needed": [round(peak / need, 3) for (peak, _), need in zip(peaks or (), needed, strict=True)],
        "wrong_shards": sum(wrong or ()),
    }


def built_everywhere(path: Path, mapping: WeightMapping, layers: int, ds: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build the usual way: whole on every rank, weights on rank 0, which zero.Init broadcasts and cuts."""
    torch.set_default_dtype(dtype)
    model = create_model("sws_vit", depth=layers, **WIDE)
    torch.set_default_dtype(torch.float32)
    if dist.get_rank() == 0:
        weights = load_tensors(path)
        model.load_state_dict({name: weights[source] for source, names in mapping.copies.items() for name in names})
        del weights
    deepspeed.zero.Init(module=model, config_dict_or_path=ds)
    return model


def wrong_shards(model: Any, path: Path, mapping: WeightMapping) -> int:
    """Count parameters whose shard on this rank is not the file's slice, cut here in the simplest way."""
    parameters, wrong = dict(model.named_parameters()), 0
    for source, tensor in load_tensors(path).items():
        for name in mapping.copies[source]:
            shard = parameters[name].ds_tensor
            slices = tensor.reshape(-1).split(shard.numel())
            own = slices[dist.get_rank()] if dist.get_rank() < len(slices) else tensor.new_empty(0)
            wrong += not torch.equal(shard[: own.numel()], own)
    return wrong


def peak_bytes() -> int:
    """Return the most memory that this process ever had (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


# ---- traffic ----


def traffic(folder: Path) -> dict[str, Any]:
    world, dtype = connect(), torch.float32
    ds, path = zero3(world, dtype), folder / "learngene.safetensors"
    found: dict[str, Any] = {}
    model, expansion = plan(path, "auto", BASE, 12)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    by_pytorch = offline_logits(path, images) if world.is_rank_zero else None
    with count_traffic() as allocating:
        allocate_shards(model, ds, world.device, dtype)
    # From here on DeepSpeed's own linear stands in for PyTorch's: the same sums, rounded in another order.
    expected = offline_logits(path, images) if world.is_rank_zero else None
    with count_traffic() as initialising:
        built = build_engine(model, ds, OptimConfig())
    masters = master_slices(built)

    def measure(way: Any) -> None:
        for p in model.parameters():
            p.ds_tensor.data.zero_()
        with count_traffic() as moved:
            if way == "gather and broadcast":
                gather_and_broadcast(model, path, expansion.mapping)
            else:
                init_from_learngene(model, masters, dataclasses.replace(expansion, mode=way), 0, world.device)
        built.eval()
        with torch.no_grad():
            logits = built(images)
        found[way] = as_json(moved) | {"logits_equal": bool(expected is not None and torch.equal(logits, expected))}

    for way in ("read", "broadcast", "gather and broadcast"):
        measure(way)
    numel = sum(p.ds_numel for p in model.parameters())
    stored = sum(torch.Size(shape).numel() for shape in expansion.header.shapes.values())
    return {
        "logits_from_pytorchs_linear": None if by_pytorch is None else (by_pytorch - expected).abs().max().item(),
        "descendant_bytes": numel * dtype.itemsize,
        "learngene_bytes": stored * dtype.itemsize,
        "allocate": as_json(allocating),
        "deepspeed.initialize": as_json(initialising),
        **found,
        "less_than_gather_and_broadcast": found["gather and broadcast"]["bytes"] / found["broadcast"]["bytes"],
    }


@torch.no_grad()
def gather_and_broadcast(model: Any, path: Path, mapping: WeightMapping) -> None:
    """Gather each parameter, write it on rank 0, broadcast and cut it again, as DeepSpeed's documentation shows."""
    parameters = dict(model.named_parameters())
    weights = load_tensors(path) if dist.get_rank() == 0 else {}
    for source, names in mapping.copies.items():
        for name in names:
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if weights:
                    parameters[name].data.copy_(weights[source])


@torch.no_grad()
def offline_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    info, weights = load_learngene(path)
    described, descendant = expand_learngene(info, weights, expansion_plan(SCHEDULE, 12))
    plain = described.build().eval()
    plain.load_state_dict(descendant)
    return plain(images)


def as_json(moved: Traffic) -> dict[str, Any]:
    return {"calls": dict(moved.calls), "bytes": moved.total_bytes}


if __name__ == "__main__":
    main()
