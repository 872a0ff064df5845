"""Find, check and load checkpoints, which are whole or absent, and which any world size and any ZeRO stage can read.

    OUTPUT/checkpoints/
      step-00000880/                        has this name only once everything in it is on the disk
        state.json                          step, epoch, scores, the model, size and checksum of every other file
        shard-00000-of-00004.safetensors    rank 0's pieces of weights, optimizer state and moving average, ...

Everything else that a run needs to go on (schedule, data position, random draws) is a function of the step.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sws_dist.checkpoint.folders import FolderKind, delete_checkpoint, delete_leftovers, kind_of, list_checkpoints
from sws_dist.checkpoint.model_file import ModelInfo, write_model_file
from sws_dist.checkpoint.safetensors_stream import FileDigest, digest
from sws_dist.checkpoint.shards import AVERAGE, WEIGHT, ShardReader, read_shards
from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World
from sws_dist.errors import RunError
from sws_dist.zero.config import precision_of
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.engine import sync_model_from_masters
from sws_dist.zero.loss_scale import load_loss_scaler_state
from sws_dist.zero.partition import whole_shapes
from sws_dist.zero.protocol import ZeroEngine

log = logging.getLogger(__name__)

VERSION = 2
_HOW_TO_RESTART = (
    "To begin anew from its weights, write them with sws convert, set model.initial_checkpoint to that file, "
    "and another output"
)


@dataclass(frozen=True)
class CheckpointState:
    """Description of a checkpoint, stored in ``state.json``. Seconds and ``history`` run on over resumes."""

    version: int
    step: int
    epoch: int
    seconds: float
    rank_seconds: float
    """Of all ranks together."""
    top1: float | None
    best_top1: float | None
    history: list[dict[str, float]]
    global_batch: int
    seed: int
    epoch_size: int
    """Images of an epoch."""
    total_steps: int
    """Steps of the whole run."""
    world_size: int
    zero_stage: int
    precision: str
    num_micros: int
    """Number of micro-batches of a step, over all ranks."""
    optimizer_steps: int
    loss_scaler: dict[str, float]
    model: dict[str, Any]
    """The fields of ``ModelInfo``."""
    shapes: dict[str, list[int]]
    """The shape of every parameter, in the model's order."""
    files: dict[str, FileDigest]
    """Size and checksum of every other file of the folder, to notice damage before anything is loaded."""


def describe_layout(engine: ZeroEngine, world: World) -> dict[str, Any]:
    """Describe how the run is spread over ranks; this may change from one start to the next."""
    return {
        "world_size": world.size,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": precision_of(engine.config),
        "num_micros": engine.gradient_accumulation_steps() * world.size,
    }


def read_state(checkpoint: Path) -> CheckpointState:
    """Read what a checkpoint says of its run.

    Raises:
        ValueError: not a checkpoint of ours.
    """
    path = checkpoint / "state.json"
    try:
        fields = json.loads(path.read_text())
        version = fields.get("version", 1)
        if version != VERSION:
            raise ValueError(f"{checkpoint}: written in version {version} of the format, this program reads {VERSION}")
        fields.setdefault("rank_seconds", fields["seconds"] * fields["world_size"])  # it is not in earlier ones
        fields["files"] = {name: FileDigest(**file) for name, file in fields["files"].items()}
        return CheckpointState(**fields)
    except OSError as error:
        raise ValueError(
            f"{checkpoint}: not a checkpoint of this trainer, or a damaged one (state.json: {error.strerror})"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Read every ``world_size``-th file of a checkpoint and compare it with its checksum.

    Returns:
        What is wrong, or None.
    """
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    for name, written in sorted(state.files.items())[rank::world_size]:
        try:
            problem = _compare(checkpoint / name, written)
        except OSError as error:  # a bad block, or a network that is away: another checkpoint may be readable
            problem = f"cannot be read ({error.strerror})"
        if problem is not None:
            return f"{checkpoint}: damaged: {name} {problem}"
    return None


def _compare(file: Path, written: FileDigest) -> str | None:
    """Return how a file differs from what was written, or None."""
    found = file.stat().st_size if file.is_file() else None
    if found != written.bytes:
        what = "is missing" if found is None else f"has {found} bytes"
        return f"{what}, {written.bytes} were written"
    return None if digest(file) == written else "is not what was written (its checksum differs)"


def latest_valid(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """Find the newest undamaged checkpoint under ``folder``, and what is wrong with newer ones. A collective.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    problems: list[str] = []
    listed: list[Path] = []
    with raise_on_all_ranks("list the checkpoints"):
        # Rank 0 alone looks: another node's file system may remember that a folder was not there (NFS).
        if world.is_rank_zero:
            listed = list_checkpoints(folder)[::-1]
    for checkpoint in broadcast_from_rank0(listed):
        found = broadcast_from_rank0(gather_on_rank0(verify(checkpoint, world.rank, world.size)))
        problem = next((each for each in found if each is not None), None)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    if problems:
        raise RunError("every checkpoint is damaged; none was touched:\n  " + "\n  ".join(problems))
    return None, []


def load_checkpoint(
    checkpoint: Path, engine: ZeroEngine, ema: ShardedEMA | None, world: World, stream: dict[str, int]
) -> CheckpointState:
    """Restore engine and moving average from ``checkpoint``. A collective.

    Each rank reads what it needs; world size, ZeRO stage and precision may be others than those of the run that saved.

    Args:
        stream: the fields ``global_batch`` to ``total_steps`` of ``CheckpointState``, as this run has them.

    Raises:
        RunError: a damaged checkpoint, or one of another model or another stream of images.
    """
    with raise_on_all_ranks("read a checkpoint"):
        state = read_state(checkpoint)
        require_same_stream(checkpoint, state, stream)
        if state.shapes != whole_shapes(engine):
            raise ValueError(
                f"{checkpoint}: of another model than the config's ({state.model['name']}); {_HOW_TO_RESTART}"
            )
        paths = [checkpoint / name for name in state.files]
        read_shards(paths, engine, ema, state.optimizer_steps)
        if state.precision == precision_of(engine.config):
            load_loss_scaler_state(engine, state.loss_scaler)
    sync_model_from_masters(engine)
    return state


def require_same_stream(checkpoint: Path, state: CheckpointState, stream: dict[str, int]) -> None:
    """Raise ValueError if a checkpoint's run sees other images than this one; ``stream`` is ``load_checkpoint``'s."""
    for name, value in stream.items():
        if getattr(state, name) != value:
            raise ValueError(
                f"{checkpoint}: written with {name} {getattr(state, name)}, this run has {value}; a run goes on "
                f"only as it began. {_HOW_TO_RESTART}"
            )


def export_weights(
    checkpoint: Path, out: Path, *, average: bool = False, dtype: torch.dtype = torch.float32
) -> ModelInfo:
    """Write a checkpoint's whole weights as one described file, holding one tensor at a time. Needs no GPU.

    Args:
        average: the moving average instead of the weights.

    Raises:
        ValueError: no checkpoint, or one without a moving average.
    """
    state = read_state(checkpoint)
    info, kind = ModelInfo.from_fields(state.model), AVERAGE if average else WEIGHT
    if average:
        scores = next((found for found in state.history[-1:] if found["step"] == state.step), {})
        info = replace(info, provenance=info.provenance | {"top1": scores.get("val_ema/top1")})
    with ShardReader(checkpoint / name for name in state.files) as reader:
        if not reader.has(kind):
            raise ValueError(f"{checkpoint}: holds no moving average; the run kept none (optim.ema_decay)")
        write_model_file(out, info, reader.entries(state.shapes, kind, dtype))
    return info


def set_aside_newer(folder: Path, step: int, world: World) -> list[str]:
    """Rename checkpoints later than ``step``: a run that goes back must not meet them again. A collective.

    Returns:
        The new names, on rank 0.
    """
    renamed = []
    with raise_on_all_ranks("set later checkpoints aside"):
        if world.is_rank_zero:
            delete_leftovers(folder)
            for later in list_checkpoints(folder):
                if _step(later) > step:
                    aside = later.with_name(f"abandoned-{later.name}")
                    delete_checkpoint(aside)
                    renamed.append(later.rename(aside).name)
    return renamed


def prune_checkpoints(folder: Path, keep_last: int, keep_best: bool, before_decay: int | None = None) -> None:
    """Delete all checkpoints but those to keep, and what kills have left behind. For rank 0.

    The newest ``keep_last`` are kept, the best if ``keep_best``, and the newest whose step is ``before_decay`` at most:
    the run may go on from there to another length. Damaged ones stay, and do not count.
    """
    delete_leftovers(folder)
    checkpoints = [found for found in list_checkpoints(folder) if kind_of(found) is FolderKind.CHECKPOINT]
    keep = set(checkpoints[-keep_last:])
    if before_decay is not None:
        keep.update([c for c in checkpoints if _step(c) <= before_decay][-1:])
    if keep_best:
        scored = [(top1, c) for c in checkpoints if (top1 := _read_top1(c)) is not None]
        if scored:
            keep.add(max(scored)[1])
    for checkpoint in checkpoints:
        if checkpoint not in keep and not checkpoint.is_symlink():
            delete_checkpoint(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _read_top1(checkpoint: Path) -> float | None:
    """Return a checkpoint's score; None if it has none, or its description is damaged."""
    try:
        return read_state(checkpoint).top1
    except ValueError:
        return None
