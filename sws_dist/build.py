"""What a run is put together from: its folder, data, models, and what is known of it beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from sws_dist.checkpoint.checkpoint import latest_valid, verify
from sws_dist.config.schema import DataConfig, RunConfig
from sws_dist.data import manifest
from sws_dist.data.manifest import Manifest
from sws_dist.data.sampler import TrainOrder
from sws_dist.data.sources import read_classes
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World
from sws_dist.distributed.traffic import count_traffic
from sws_dist.learngene.expand import WeightMapping, fresh_head, map_weights
from sws_dist.learngene.file import LearngeneHeader
from sws_dist.learngene.plan import expansion_plan
from sws_dist.learngene.sharded_init import TransferMode, choose_transfer, init_by_broadcast, init_by_reading
from sws_dist.logging.units import format_bytes
from sws_dist.models import SWSVisionTransformer
from sws_dist.zero.config import set_zero3_memory_defaults
from sws_dist.zero.engine import build_engine
from sws_dist.zero.shard_writer import allocate_shards, master_slices


def find_checkpoint(output: Path, resume: str | None, world: World, notes: list[str]) -> Path | None:
    """The checkpoint that ``--resume`` means; with ``auto`` there may be none. A collective.

    Damaged ones are skipped by ``auto``, with a line in ``notes``.

    Raises:
        RunError: it is damaged, or all are.
    """
    if resume is None:
        return None
    if resume == "auto":
        found, problems = latest_valid(output / "checkpoints", world)
        notes += [f"warning: {problem}; going on from {found.name}" for problem in problems if found]
        return found
    with raise_on_all_ranks("check the checkpoint"):
        problem = verify(Path(resume), world.rank, world.size)
        if problem is not None:
            raise ValueError(problem)
    return Path(resume)


def load_image_lists(config: RunConfig, output: Path, resuming: bool, world: World) -> tuple[Manifest, Manifest]:
    """Training and validation images, listed by rank 0 alone: a folder is not read once a rank. A collective.

    A run keeps its lists and goes on with them: a file that went bad or vanished meanwhile is then replaced by rule,
    as it would have been without the interruption, instead of changing the order of all others.
    """
    kept = [output / f"images-{split}.npz" for split in ("train", "val")]
    found = None
    with raise_on_all_ranks("list the images"):
        if world.is_main and resuming and all(path.is_file() for path in kept):
            train, val = (Manifest.load(path) for path in kept)
            found = train, val
        elif world.is_main:
            found = list_images(config.data)
            for path, images in zip(kept, found, strict=True):
                images.save(path)
    return broadcast_from_rank0(found)


def list_images(data: DataConfig) -> tuple[Manifest, Manifest]:
    """Training and validation images."""
    classes = read_classes(data.classes) if data.classes else None
    train = manifest.scan(data.root, data.train_split, classes, max_bad_share=data.max_bad_share)
    val = manifest.scan(data.root, data.val_split, train.classes, max_bad_share=data.max_bad_share)
    return train, val


def train_order(config: RunConfig, images: Manifest) -> TrainOrder:
    """Raises ValueError for a shard window over images that are not in shards."""
    shards = None if images.spans is None else images.spans[:, 0]
    window = config.data.shuffle_shards
    if window is not None and shards is None:
        raise ValueError(f"data.shuffle_shards {window}: {images.folder} holds no tar shards; set it to null")
    return TrainOrder(len(images), config.train.seed, config.augment.num_repeats, shards, window)


class Expansion(NamedTuple):
    """A learngene that the run starts from, and how it becomes the student."""

    path: str
    header: LearngeneHeader
    way: TransferMode
    design: WeightMapping


def plan_expansion(config: RunConfig, model: Any) -> Expansion | None:
    """What ``model.initial_learngene`` asks for, checked against the student before anything is filled. A collective.

    Raises:
        RunError: a file that is no learngene or of another geometry, a plan that does not fit.
    """
    path = config.model.initial_learngene
    if path is None:
        return None
    header, way = choose_transfer(path, config.model.expand)
    with raise_on_all_ranks("plan the expansion"):
        if not isinstance(model, SWSVisionTransformer):
            raise ValueError(f"model.initial_learngene: {config.model.name} is not one of our models (sws_...)")
        layers = expansion_plan(header.info.kwargs["schedule"], len(model.blocks), config.model.plan)
        try:
            design = map_weights(header.info, header.shapes, model, layers)
        except ValueError as error:
            raise ValueError(f"model.initial_learngene {path}: {error}") from None
    return Expansion(path, header, way, design)


def build_student_engine(
    config: RunConfig, model: Any, ds: dict[str, Any], found: Expansion | None, world: World, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """The DeepSpeed engine around the student with its initial weights, and what there is to say of them. A collective.

    A student on the meta device without ``found`` gets zeros: a checkpoint will be loaded.
    """
    if ds["zero_optimization"]["stage"] == 3 and isinstance(model, SWSVisionTransformer):
        set_zero3_memory_defaults(ds["zero_optimization"], sum(p.numel() for p in model.blocks[0].parameters()))
    if not next(model.parameters()).is_meta:
        return build_engine(model, ds, config.optim), []
    num_bytes = dtype.itemsize * sum(p.numel() for p in model.parameters())
    with count_traffic() as allocating:
        allocate_shards(model, ds, world.device, dtype)
    with count_traffic() as initialising:
        engine = build_engine(model, ds, config.optim)
    if found is None:
        return engine, []
    path, header, way, design = found
    fresh = fresh_head(model, config.train.seed) if design.fresh else {}
    masters = master_slices(engine)
    with count_traffic() as moving:
        if way == "read":
            filled = init_by_reading(model, path, header, design, fresh, masters)
        else:
            filled = init_by_broadcast(model, path, header, design, fresh, masters, world.device)
    lines = [f"{len(design.layers)} layers from stages {','.join(map(str, design.layers))} of {path}"]
    if design.dropped:
        lines.append(f"warning: stages {design.dropped} are dropped, their layers are not used")
    if design.fresh:
        lines.append(f"the head is new: {model.num_classes} classes, the learngene knows {header.info.num_classes}")
    how = "read by this rank" if way == "read" else "broadcast by rank 0"
    lines.append(f"{format_bytes(filled.num_bytes)} of the learngene {how}; collectives: {moving}")
    if filled.gathered:
        lines.append(f"{len(filled.gathered)} parameters, on NVMe or quantised, were gathered, written and cut again")
    lines.append(
        f"before that: zero.Init {allocating}, deepspeed.initialize {initialising}; "
        f"to gather and broadcast every parameter would have been {format_bytes(2 * num_bytes)}"
    )
    return engine, lines


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
