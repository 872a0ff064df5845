"""Build a run: ``build_run`` makes everything that a ``Trainer`` needs.

what ``prepare.py`` makes -> DeepSpeed engine with its weights -> moving average -> restored state -> stored logits
-> recorder
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sws_dist.checkpoint.checkpoint import (
    CheckpointState,
    describe_layout,
    load_checkpoint,
    set_aside_newer,
)
from sws_dist.checkpoint.model_file import describe_other_normalisation
from sws_dist.config.lr_schedule import LRSchedule
from sws_dist.config.schema import RunConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.flight_recorder import FlightRecorder
from sws_dist.distributed.heartbeat import Heartbeat
from sws_dist.distributed.init import World
from sws_dist.distributed.nonfinite import NonFiniteGuard
from sws_dist.learngene.sharded_init import Expansion, init_from_learngene, log_expansion
from sws_dist.logging.recorder import Recorder
from sws_dist.models import SWSVisionTransformer
from sws_dist.models.losses import DistillationLoss
from sws_dist.prepare import PreparedRun, prepare_run
from sws_dist.run_dir import CHECKPOINTS, HEARTBEATS
from sws_dist.zero.config import set_zero3_memory_defaults
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.engine import build_engine
from sws_dist.zero.monitor import Monitors, open_monitors
from sws_dist.zero.protocol import ZeroEngine
from sws_dist.zero.shard_writer import allocate_shards, master_slices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from, and what it says of the run."""

    checkpoint: Path
    state: CheckpointState


@dataclass(frozen=True)
class RunParts(PreparedRun):
    """Everything that one rank's part of a run is made of. The loop's own state is the ``Trainer``'s.

    ``teacher`` may be its stored logits here.
    """

    heartbeat: Heartbeat
    lr_schedule: LRSchedule
    loss: DistillationLoss
    engine: ZeroEngine
    ema: ShardedEMA | None
    resumed: Resumed | None
    recorder: Recorder
    nonfinite: NonFiniteGuard


def build_run(
    config: RunConfig, deepspeed_config: str | Path | Mapping[str, Any], resume: str | None = None
) -> RunParts:
    """Build one training run on this rank. A collective.

    Args:
        config: what to train.
        deepspeed_config: the DeepSpeed JSON, which says how the run is sharded: its file, its name, or its content.
        resume: ``auto`` (the newest valid checkpoint of ``config.output``, if any), a checkpoint's folder, or None.

    Raises:
        ValueError, OSError, RunError: errors that the user can fix, on every rank.
    """
    run = prepare_run(config, deepspeed_config, resume)
    world, output, dtype = run.world, run.output, run.dtype
    flight_recorder = FlightRecorder(output / "crash" / broadcast_from_rank0(time.strftime("%Y%m%d-%H%M%S")), world)
    with raise_on_all_ranks("prepare the heartbeats"):
        heartbeat = Heartbeat(output / HEARTBEATS, world, config.train.timeout_s, flight_recorder)
    engine = build_student_engine(config, run.models.student, run.ds, run.expansion, world, dtype)
    # After all weights are in place, so that the average starts from them; before a checkpoint restores it.
    ema = ShardedEMA(engine, config.optim.ema_decay) if config.optim.ema_decay else None
    resumed = None
    if run.checkpoint is not None:
        resumed = restore_run(run.checkpoint, engine, ema, world, run.stream)
    with raise_on_all_ranks("start the monitors"):
        monitors = open_monitors(run.ds, config.train.global_batch, output)
    paths = run.data.train.paths
    teacher = run.open_logits(resumed.state.step if resumed else 0)
    if resumed is not None:  # at last, when nothing can keep the run from going on
        for aside in set_aside_newer(output / CHECKPOINTS, resumed.state.step, world):
            log.info("set aside as %s: it is later than the checkpoint that this run goes on from", aside)
    return RunParts(
        **(vars(run) | {"teacher": teacher}),
        heartbeat=heartbeat,
        lr_schedule=LRSchedule.of_run(config, run.data.order.epoch_size),
        loss=DistillationLoss(config.distill),
        engine=engine,
        ema=ema,
        resumed=resumed,
        recorder=build_recorder(output, resumed, world, monitors),
        nonfinite=NonFiniteGuard(config.train.skip_nonfinite, output, lambda index: str(paths[index])),
    )


def build_student_engine(
    config: RunConfig,
    student: Any,
    ds: dict[str, Any],
    expansion: Expansion | None,
    world: World,
    dtype: torch.dtype,
) -> ZeroEngine:
    """Build the DeepSpeed engine around the student with its initial weights. A collective.

    A student on the meta device without ``expansion`` gets zeros: a checkpoint will be loaded.
    """
    if ds["zero_optimization"]["stage"] == 3 and isinstance(student, SWSVisionTransformer):
        set_zero3_memory_defaults(ds["zero_optimization"], sum(p.numel() for p in student.blocks[0].parameters()))
    if next(student.parameters()).is_meta:
        allocate_shards(student, ds, world.device, dtype)
    engine = build_engine(student, ds, config.optim)
    if expansion is not None:
        masters = master_slices(engine)
        report = init_from_learngene(student, masters, expansion, config.train.seed, world.device)
        log_expansion(expansion, report, student.num_classes)
        note = describe_other_normalisation(expansion.path, expansion.header.info, config.data)
        if note is not None:
            log.warning(note)
    return engine


def restore_run(
    checkpoint: Path, engine: ZeroEngine, ema: ShardedEMA | None, world: World, stream: dict[str, int]
) -> Resumed:
    """Load a checkpoint, and say what is different since. A collective."""
    state = load_checkpoint(checkpoint, engine, ema, world, stream)
    for key, value in describe_layout(engine, world).items():
        if getattr(state, key) != value:
            log.info("going on with %s %s; the checkpoint was written with %s", key, value, getattr(state, key))
            if key == "num_micros":
                log.info("mixup and drop-path draw for each micro-batch: from here on their draws are others")
    return Resumed(checkpoint, state)


def build_recorder(output: Path, resumed: Resumed | None, world: World, monitors: Monitors | None) -> Recorder:
    """Build what records the run's numbers, from where the checkpoint is."""
    follow = None if monitors is None else monitors.write
    if resumed is None:
        return Recorder(output, world.is_rank_zero, follow=follow)
    step, history = resumed.state.step, resumed.state.history
    is_evaluated = bool(history) and history[-1]["step"] == step
    return Recorder(output, world.is_rank_zero, step, is_evaluated, follow)
