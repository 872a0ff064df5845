"""Prepare a run from its configs: everything but the engine. This is where a wrong run ends, before it costs anything.

process group -> resolved configs -> output folder -> checkpoint to resume -> images -> models -> input pipeline

``check_run`` does no more than this, for ``sws train --dry-run``; ``build.py`` goes on from here.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from sws_dist.build_models import DTYPES, ModelParts, build_models
from sws_dist.checkpoint.checkpoint import (
    latest_valid,
    read_state,
    require_same_stream,
    verify,
)
from sws_dist.config.lr_schedule import count_steps
from sws_dist.config.resume import compare_with_own_config
from sws_dist.config.schema import RunConfig
from sws_dist.data.build import DataParts, build_data, list_images
from sws_dist.data.manifest import Manifest
from sws_dist.data.moved import follow_move, is_data_moved
from sws_dist.data.sampler import TrainOrder
from sws_dist.distill.stored import open_stored_teacher
from sws_dist.distill.teacher import Teacher, load_teacher
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World, init_distributed
from sws_dist.learngene.sharded_init import Expansion, prepare_expansion
from sws_dist.provenance import collect_provenance
from sws_dist.run_dir import CHECKPOINTS, prepare_output, run_folder
from sws_dist.seed import seed_everything
from sws_dist.zero.config import config_source, precision_of, resolve_deepspeed_config
from sws_dist.zero.engine import connect_deepspeed
from sws_dist.zero.schema import check_against_deepspeed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """Everything of a run that can be had without the engine: what ``sws train --dry-run`` checks."""

    config: RunConfig
    ds: dict[str, Any]
    """The resolved DeepSpeed config."""
    world: World
    output: Path
    provenance: dict[str, Any]
    """Commit, versions and hardware of rank 0."""
    dtype: torch.dtype
    checkpoint: Path | None
    """The checkpoint that the run goes on from."""
    models: ModelParts
    teacher: Teacher | None
    """None too where its stored logits are read, which ``open_logits`` opens."""
    expansion: Expansion | None
    data: DataParts
    total_steps: int
    stream: dict[str, int]
    """What decides which images and draws a step sees, and has to be the checkpoint's."""

    def open_logits(self, step: int) -> Teacher | None:
        """Open the stored logits that are left after ``step``, where the run reads any; else return ``teacher``.

        A collective.
        """
        if self.config.distill.logits is None:
            return self.teacher
        global_batch = self.config.train.global_batch
        with raise_on_all_ranks("open the stored logits"):
            left = range(step * global_batch, self.total_steps * global_batch)
            micro_batch, size = self.ds["train_micro_batch_size_per_gpu"], self.data.order.epoch_size
            return open_stored_teacher(self.config, self.data.train, size, left, micro_batch, self.world)


def prepare_run(
    config: RunConfig,
    deepspeed_config: str | Path | Mapping[str, Any],
    resume: str | None = None,
    lists: Path | None = None,
) -> PreparedRun:
    """Build and check everything of a run but the engine and what needs one. A collective.

    Args:
        lists: a folder for the lists of images, seen by all nodes; None: the run's own.

    Raises:
        ValueError, OSError, RunError: what ``build_run`` raises.
    """
    world = init_distributed(config.train.timeout_s)
    connect_deepspeed()
    with raise_on_all_ranks("read the DeepSpeed config"):
        ds = resolve_deepspeed_config(deepspeed_config, config, world.size)
        check_against_deepspeed(ds, config_source(deepspeed_config), world.device)
    dtype = DTYPES[precision_of(ds)]
    output = prepare_output(config, resume, world)
    provenance = broadcast_from_rank0(collect_provenance() if world.is_rank_zero else None)
    checkpoint = find_checkpoint(output, resume, world)
    own = load_own_config(checkpoint, config, ds)
    train, val = load_image_lists(config, lists or output, checkpoint, own, world)
    with raise_on_all_ranks("build the input pipeline"):
        data = build_data(config, train, val, world.rank, world.size, world.device)
    with raise_on_all_ranks("build the models"):
        seed_everything(config.train.seed)
        models = build_models(config, train.classes, world.device, dtype, provenance, data.order.epoch_size)
    teacher: Teacher | None = None
    if config.distill.logits is None:
        with raise_on_all_ranks("load the teacher"):
            online = load_teacher(config.distill, train.classes, config.data)
            teacher = online and online.to(world.device, dtype)
    expansion = None if checkpoint else prepare_expansion(config.model, models.student, train.classes)
    total_steps = count_steps(config.train, data.order.epoch_size)
    stream = describe_stream(config, data.order, total_steps)
    if own is not None and own.train.epochs != config.train.epochs:  # compared by load_own_config
        del stream["total_steps"]
    return PreparedRun(
        config=config,
        ds=ds,
        world=world,
        output=output,
        provenance=provenance,
        dtype=dtype,
        checkpoint=checkpoint,
        models=models,
        teacher=teacher,
        expansion=expansion,
        data=data,
        total_steps=total_steps,
        stream=stream,
    )


def check_run(
    config: RunConfig, deepspeed_config: str | Path | Mapping[str, Any], resume: str | None = None
) -> PreparedRun:
    """Check a run as far as that goes without training, and leave nothing behind. A collective.

    Raises:
        ValueError, OSError, RunError: what ``build_run`` raises; and for a checkpoint of another stream of images.
    """
    world = init_distributed(config.train.timeout_s)
    output = Path(config.output)
    lists, made = output / ".dry-run", list[Path]()
    try:
        with raise_on_all_ranks("write into the output folder"):
            if world.is_rank_zero:
                needed = (output / CHECKPOINTS, output, *output.parents)
                made = [folder for folder in needed if not folder.exists()]
                lists.mkdir(parents=True, exist_ok=True)
        run = prepare_run(config, deepspeed_config, resume, lists)
        step = 0
        if run.checkpoint is not None:
            with raise_on_all_ranks("read the checkpoint"):
                state = read_state(run.checkpoint)
                require_same_stream(run.checkpoint, state, run.stream)
            step = state.step
        run.open_logits(step)
        return run
    finally:
        if world.is_rank_zero:
            shutil.rmtree(lists, ignore_errors=True)
            with suppress(OSError):  # somebody else has put something there
                for folder in made:  # the innermost first
                    folder.rmdir()


# ---- resuming --------------------------------------------------------------------------------------------------------


def find_checkpoint(output: Path, resume: str | None, world: World) -> Path | None:
    """Find the checkpoint that ``--resume`` means; with ``auto`` there may be none. A collective.

    ``auto`` skips damaged ones with a warning.

    Raises:
        RunError: the checkpoint is damaged, or all are.
    """
    if resume is None:
        return None
    if resume == "auto":
        found, problems = latest_valid(output / CHECKPOINTS, world)
        for each in problems:
            log.warning("%s; going on from %s", each, found and found.name)
        return found
    with raise_on_all_ranks("check the checkpoint"):
        problem = verify(Path(resume), world.rank, world.size)
        if problem is not None:
            raise ValueError(problem)
    return Path(resume)


def load_own_config(checkpoint: Path | None, config: RunConfig, ds: dict[str, Any]) -> RunConfig | None:
    """Return the config of the run that is resumed, after comparing it with this one. A collective.

    Raises:
        RunError: they differ in what a run may not change.
    """
    with raise_on_all_ranks("compare the config with the run's own"):
        if checkpoint is None:
            return None
        state = read_state(checkpoint)
        return compare_with_own_config(run_folder(checkpoint), config, ds, reached=(state.step, state.epoch_size))


def describe_stream(config: RunConfig, order: TrainOrder, total_steps: int) -> dict[str, int]:
    """Describe what decides which images and draws a step sees: a run goes on only with the same."""
    return {
        "global_batch": config.train.global_batch,
        "seed": config.train.seed,
        "epoch_size": order.epoch_size,
        "total_steps": total_steps,
    }


# ---- images ----------------------------------------------------------------------------------------------------------


def load_image_lists(
    config: RunConfig, output: Path, checkpoint: Path | None, own: RunConfig | None, world: World
) -> tuple[Manifest, Manifest]:
    """List training and validation images on rank 0 alone, so that a folder is read once. A collective.

    All ranks then map the two files that rank 0 wrote into the run's folder, and share their memory on each node.

    A run keeps its lists and goes on with them: a file that went bad or vanished meanwhile is then replaced by rule,
    as it would have been without the interruption, instead of changing the order of all others.

    Args:
        checkpoint: the checkpoint that the run goes on from, if any.
        own: the config of the run that wrote it.

    Raises:
        RunError: no images; or a resumed run finds others where ``config`` leads than it began with.
    """
    files, notes = _list_files(output), None
    with raise_on_all_ranks("list the images"), _warn_if_long(config.train.timeout_s, world):
        if world.is_rank_zero:
            kept = _load_kept_lists(run_folder(checkpoint)) if checkpoint is not None else None
            if kept is None:
                found = list_images(config.data)
            elif own is not None and not is_data_moved(own, config, kept[0]):
                found = kept
            else:
                found = follow_move(kept, list_images(config.data))
            if found is not kept or not all(file.is_file() for file in files):
                for file, images in zip(files, found, strict=True):
                    # A relative folder would be another one where the run is resumed from elsewhere.
                    replace(images, folder=Path(os.path.abspath(images.folder))).save(file)
            notes = [images.notes for images in found]
    notes = broadcast_from_rank0(notes)
    with raise_on_all_ranks("map the lists of images"):
        train, val = (replace(Manifest.load(file), notes=said) for file, said in zip(files, notes, strict=True))
    return train, val


@contextmanager
def _warn_if_long(timeout_s: int, world: World) -> Iterator[None]:
    """Say what the ranks wait for before they give up: their own error names a collective and no cause."""
    waited_s = timeout_s / 10
    message = (
        f"rank 0 has been listing the images for {waited_s:g} s; the other ranks wait {timeout_s} s at most "
        "(train.timeout_s). If that is too short, raise it, or let sws scan list the images once, and set "
        "data.trust_manifest"
    )
    timer = Timer(waited_s, log.warning, [message])
    timer.daemon = True
    if world.is_rank_zero and world.size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _list_files(folder: Path, suffix: str = "safetensors") -> list[Path]:
    return [folder / f"images-{split}.{suffix}" for split in ("train", "val")]


def _load_kept_lists(folder: Path) -> tuple[Manifest, Manifest] | None:
    for files in (_list_files(folder), _list_files(folder, "npz")):  # the second are of earlier versions
        if all(file.is_file() for file in files):
            train, val = map(Manifest.load, files)
            return train, val
    return None
