"""What a run is put together from: its folder, data, models, and what is known of it beforehand."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.layers import use_reentrant_ckpt
from torch import nn

from sws_dist import checkpoint, comm, ds_config, expansion, files, filling, model_file, provenance
from sws_dist import config as run_config
from sws_dist import engine as ds_engine
from sws_dist.comm import World
from sws_dist.config import DataConfig, RunConfig
from sws_dist.data import manifest
from sws_dist.data.bad_images import named
from sws_dist.data.manifest import Manifest
from sws_dist.data.sampler import TrainOrder
from sws_dist.data.sources import read_classes
from sws_dist.distillation import Teacher, load_teacher
from sws_dist.errors import ConfigError
from sws_dist.flops import forward_flops
from sws_dist.learngene import Header
from sws_dist.learngene import describe as describe_ours
from sws_dist.model_file import ModelInfo
from sws_dist.models import SWSVisionTransformer, create_model, fused, geometry
from sws_dist.traffic import counted, in_units

_APPEARS_S = 15.0
"""What one node writes may take so long to be seen by another (NFS caches folders for some seconds)."""


def prepare_output(config: RunConfig, resume: str | None, world: World) -> Path:
    """Create the run's folder, which all nodes have to see, refusing to mix two runs in one. A collective."""
    output = Path(config.output)
    with comm.together("prepare the output folder"):
        if world.is_main:
            output.mkdir(parents=True, exist_ok=True)
            if not os.access(output, os.W_OK):
                raise PermissionError(f"output {output}: no permission to write there")
            if resume is None and checkpoint.find(output / "checkpoints"):
                raise ConfigError(
                    f"output {output}: already holds a run; go on with --resume auto, or --set output=ANOTHER"
                )
    _require_shared(output, world)
    return output


def _require_shared(output: Path, world: World) -> None:
    """Stop all ranks if what rank 0 writes into the run's folder is not there for every one of them. A collective."""
    if world.nodes == 1:
        return
    token = output / comm.from_main(f".seen-by-all-{uuid.uuid4().hex}")
    try:
        with comm.together("write into the output folder"):
            if world.is_main:
                token.touch()
        with comm.together("find there what rank 0 wrote"):
            deadline = time.monotonic() + _APPEARS_S
            while not token.exists():
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"output {output}: on {socket.gethostname()} it is another folder than on rank 0's node; "
                        "all nodes have to share its file system"
                    )
                time.sleep(0.1)
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)


def find_checkpoint(output: Path, resume: str | None, world: World, notes: list[str]) -> Path | None:
    """The checkpoint that ``--resume`` means; with ``auto`` there may be none. A collective.

    Damaged ones are skipped by ``auto``, with a line in ``notes``.

    Raises:
        RunError: it is damaged, or all are.
    """
    if resume is None:
        return None
    if resume == "auto":
        found, problems = checkpoint.newest_whole(output / "checkpoints", world)
        notes += [f"warning: {problem}; going on from {found.name}" for problem in problems if found]
        return found
    with comm.together("check the checkpoint"):
        problem = checkpoint.damage(Path(resume), world.rank, world.size)
        if problem is not None:
            raise ValueError(problem)
    return Path(resume)


def manifests(config: RunConfig, output: Path, resuming: bool, world: World) -> tuple[Manifest, Manifest]:
    """Training and validation images, listed by rank 0 alone: a folder is not read once a rank. A collective.

    A run keeps its lists and goes on with them: a file that went bad or vanished meanwhile is then replaced by rule,
    as it would have been without the interruption, instead of changing the order of all others.
    """
    kept = [output / f"images-{split}.npz" for split in ("train", "val")]
    found = None
    with comm.together("list the images"):
        if world.is_main and resuming and all(path.is_file() for path in kept):
            train, val = (Manifest.load(path) for path in kept)
            found = train, val
        elif world.is_main:
            found = list_images(config.data)
            for path, images in zip(kept, found, strict=True):
                images.save(path)
    return comm.from_main(found)


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


def models(
    config: RunConfig, classes: Sequence[str], device: torch.device, dtype: torch.dtype
) -> tuple[Any, Teacher | None, str]:
    """The student with its initial weights, the teacher if there is one, and who runs the student's stages.

    A student that starts from a learngene is on the meta device; ``start`` fills it.

    Args:
        device, dtype: where and in what the student will run; nothing is moved there yet.

    Raises:
        ValueError: an unknown model or argument, weights that do not fit, kernels that cannot run.
    """
    data = config.data
    with torch.device("meta") if config.model.initial_learngene else nullcontext():
        model = build_model(config, len(classes))
    if config.model.initial_checkpoint:
        _initialise(model, config.model.initial_checkpoint)
    if config.optim.ema_decay and any(b.is_floating_point() for b in model.buffers()):
        raise ValueError(
            f"optim.ema_decay: {config.model.name} has running statistics, which are not averaged; "
            "set optim.ema_decay to null"
        )
    kernels = fused.choose(config.model.kernels, model, device, dtype)
    if config.model.cuda_graphs:
        kernels += f", {fused.use_cuda_graphs(model, device)}"
    if config.model.grad_checkpointing:
        if use_reentrant_ckpt():
            raise ValueError(
                "model.grad_checkpointing: timm is set to reentrant checkpointing (TIMM_REENTRANT_CKPT), which fails "
                "under ZeRO-2 and can be silently wrong under ZeRO-3; unset it"
            )
        model.set_grad_checkpointing(True)
    if config.model.compile:
        model.compile()
    teacher = load_teacher(config.distill, len(classes), classes, data.mean, data.std, data.image_size)
    return model, teacher, kernels


def build_model(config: RunConfig, num_classes: int) -> Any:
    """The configured model with random weights."""
    kwargs: dict[str, Any] = {"num_classes": num_classes, **config.model.kwargs}
    if config.model.name.startswith("sws_"):
        kwargs["img_size"] = config.data.image_size
    for key, value in (("depth", config.model.depth), ("schedule", config.model.schedule)):
        if value is not None:
            kwargs[key] = value
    if config.model.drop_path:
        kwargs["drop_path_rate"] = config.model.drop_path
    return create_model(config.model.name, **kwargs)


def _initialise(model: nn.Module, path: str) -> None:
    """Load ``model.initial_checkpoint``; what two geometries of equal shapes would hide is compared as well."""
    if Path(path).suffix == ".safetensors" and isinstance(model, SWSVisionTransformer):
        info, weights = model_file.load(path)
        ours = geometry(model)
        differ = [
            f"{key}: {info.kwargs[key]} in the file, {ours[key]} in the config"
            for key in ("schedule", "img_size", "patch_size", "num_heads", "class_token", "global_pool", "norm_eps")
            if key in info.kwargs and info.kwargs[key] != ours[key]
        ]
        if differ:
            raise ValueError(f"model.initial_checkpoint {path} is of another model: {'; '.join(differ)}")
    else:
        weights = model_file.load_foreign(path)
    model_file.load_into(model, weights, path)


class Expansion(NamedTuple):
    """A learngene that the run starts from, and how it becomes the student."""

    path: str
    header: Header
    way: filling.Way
    design: expansion.Design


def plan_expansion(config: RunConfig, model: Any) -> Expansion | None:
    """What ``model.initial_learngene`` asks for, checked against the student before anything is filled. A collective.

    Raises:
        RunError: a file that is no learngene or of another geometry, a plan that does not fit.
    """
    path = config.model.initial_learngene
    if path is None:
        return None
    header, way = filling.choose(path, config.model.expand)
    with comm.together("plan the expansion"):
        if not isinstance(model, SWSVisionTransformer):
            raise ValueError(f"model.initial_learngene: {config.model.name} is not one of our models (sws_...)")
        layers = expansion.plan(header.info.kwargs["schedule"], len(model.blocks), config.model.plan)
        try:
            design = expansion.design(header.info, header.shapes, model, layers)
        except ValueError as error:
            raise ValueError(f"model.initial_learngene {path}: {error}") from None
    return Expansion(path, header, way, design)


def start(
    config: RunConfig, model: Any, ds: dict[str, Any], found: Expansion | None, world: World, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """The DeepSpeed engine around the student with its initial weights, and what there is to say of them. A collective.

    A student on the meta device without ``found`` gets zeros: a checkpoint will be loaded.
    """
    if ds["zero_optimization"]["stage"] == 3 and isinstance(model, SWSVisionTransformer):
        ds_config.lean(ds["zero_optimization"], sum(p.numel() for p in model.blocks[0].parameters()))
    if not next(model.parameters()).is_meta:
        return ds_engine.build(model, ds, config.optim), []
    num_bytes = dtype.itemsize * sum(p.numel() for p in model.parameters())
    with counted() as allocating:
        filling.allocate(model, ds, world.device, dtype)
    with counted() as initialising:
        engine = ds_engine.build(model, ds, config.optim)
    if found is None:
        return engine, []
    path, header, way, design = found
    fresh = expansion.fresh_head(model, config.train.seed) if design.fresh else {}
    masters = filling.own_masters(engine)
    with counted() as moving:
        if way == "read":
            filled = filling.read_into(model, path, header, design, fresh, masters)
        else:
            filled = filling.broadcast_into(model, path, header, design, fresh, masters, world.device)
    lines = [f"{len(design.layers)} layers from stages {','.join(map(str, design.layers))} of {path}"]
    if design.dropped:
        lines.append(f"warning: stages {design.dropped} are dropped, their layers are not used")
    if design.fresh:
        lines.append(f"the head is new: {model.num_classes} classes, the learngene knows {header.info.num_classes}")
    how = "read by this rank" if way == "read" else "broadcast by rank 0"
    lines.append(f"{in_units(filled.num_bytes)} of the learngene {how}; collectives: {moving}")
    if filled.gathered:
        lines.append(f"{len(filled.gathered)} parameters, on NVMe or quantised, were gathered, written and cut again")
    lines.append(
        f"before that: zero.Init {allocating}, deepspeed.initialize {initialising}; "
        f"to gather and broadcast every parameter would have been {in_units(2 * num_bytes)}"
    )
    return engine, lines


class Flops(NamedTuple):
    """Of one forward pass over one image."""

    student: int
    teacher: int | None
    """None: torch cannot count this model's."""


def count_flops(config: RunConfig, num_classes: int) -> Flops:
    size = config.data.image_size
    student = forward_flops(lambda: build_model(config, num_classes), size)
    if config.distill.teacher is None:
        return Flops(student, 0)
    name = config.distill.teacher
    info = model_file.read_info(name) if name.endswith(".safetensors") else None
    try:
        return Flops(student, forward_flops(info.build if info else lambda: create_model(name), size))
    except Exception:  # some timm models do not run on the meta device; a figure of the report is not worth a run
        return Flops(student, None)


def depth(model: nn.Module) -> int | None:
    """Layers that an image passes through, for our models."""
    return sum(model.schedule) if isinstance(model, SWSVisionTransformer) else None


def describe(config: RunConfig, model: nn.Module, classes: Sequence[str]) -> ModelInfo:
    """What the run's weight files will say of themselves."""
    pixels = {key: getattr(config.data, key) for key in ("mean", "std", "image_size", "crop_pct", "interpolation")}
    about = {
        "run": config.output,
        "model": config.model.name,
        "epochs": config.train.epochs,
        "seed": config.train.seed,
        "teacher": config.distill.teacher,
        "initial_checkpoint": config.model.initial_checkpoint,
        "initial_learngene": config.model.initial_learngene,
        **provenance.collect(),
    }
    if isinstance(model, SWSVisionTransformer):
        kind = "learngene" if model.is_shared else "model"
        return describe_ours(model, kind, pixels=pixels, classes=list(classes), provenance=about)
    return ModelInfo("model", config.model.name, dict(config.model.kwargs), len(classes), pixels, list(classes), about)


def average_buffers(model: nn.Module) -> None:
    """Running statistics (batch norm), which each rank keeps for itself, made equal on all ranks. A collective."""
    if dist.get_world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def write_configs(config: RunConfig, ds: dict[str, Any], output: Path) -> dict[str, str]:
    """``config.yaml``, ``deepspeed.json`` and ``environment.json`` in the run's folder; their texts by name."""
    texts = {
        "config.yaml": run_config.to_yaml(config),
        "deepspeed.json": json.dumps(ds, indent=2) + "\n",
        "environment.json": json.dumps(provenance.collect(), indent=2) + "\n",
    }
    for name, text in texts.items():
        files.write_text(output / name, text)
    return texts


def tell_of_data(train: Manifest, val: Manifest) -> list[str]:
    """What whoever starts a run should hear of its images: how many there are, and which are left out."""
    lines = [f"{len(train)} training and {len(val)} validation images in {len(train.classes)} classes"]
    for kind, images in (("training", train), ("validation", val)):
        lines += images.notes
        if images.bad:
            lines.append(f"{len(images.bad)} bad {kind} image(s) in {images.folder} are left out")
            lines += named(images.bad)
    return lines
