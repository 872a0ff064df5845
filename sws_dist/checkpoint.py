"""Checkpoints that are whole or absent.

    OUTPUT/checkpoints/
      step-00000880/                 has this name only once everything in it is on the disk
        state.json                   step, epoch, scores, who wrote it, and the size of every file
        model.safetensors            whole fp32 weights with their description: usable as they are
        model_ema.safetensors        the same of the moving average, where one is kept
        ema-0000.safetensors         rank 0's shard of the moving average, ...
        mp_rank_00_model_states.pt   DeepSpeed's files: shards of masters and optimizer, ...
      latest                         DeepSpeed's pointer to the newest

Everything else that a run needs to go on (schedule, data position, random draws) is a function of the step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sws_dist import comm, ds_config, model_file
from sws_dist.comm import World
from sws_dist.engine import ShardedEMA, full_weights, masters
from sws_dist.files import sync, write_json, write_text
from sws_dist.model_file import ModelInfo

_HEADROOM = 1.05


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself. ``seconds`` and ``history`` run on over resumes.

    ``num_micros``: micro-batches of a step, over all ranks. ``epoch_size``: images. ``total_steps``: of the whole run.
    """

    step: int
    epoch: int
    seconds: float
    top1: float | None
    best_top1: float | None
    history: list[dict[str, float]]
    world_size: int
    zero_stage: int
    precision: str
    global_batch: int
    num_micros: int
    seed: int
    epoch_size: int
    total_steps: int
    files: dict[str, int]
    """Name -> bytes of everything but ``state.json``: how a cut file is noticed before anything is loaded."""


def describe_layout(engine: Any, world: World) -> dict[str, Any]:
    """What has to agree between the run that saves and the run that loads."""
    return {
        "world_size": world.size,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": ds_config.precision(engine.config),
    }


def save(
    folder: Path, engine: Any, ema: ShardedEMA | None, info: ModelInfo, world: World, state: dict[str, Any]
) -> Path:
    """Write one checkpoint under ``folder``; the last good one stays until this one is whole. A collective.

    Args:
        state: ``State``'s fields but for the layout's and ``files``.
    """
    final = folder / f"step-{state['step']:08d}"
    partial = folder / f".{final.name}"
    with comm.together("prepare a checkpoint"):
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _require_space(folder, engine, ema, world.size)
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)  # ends in a barrier
    except RuntimeError as error:
        if not any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):
            raise
        # How torch's file writer reports a disk that filled up meanwhile.
        raise OSError(f"{partial}: cannot be written ({_first_line(error)}); the last checkpoint is whole") from error
    write_weights(partial / "model.safetensors", engine, info)
    if ema is not None:
        with ema.applied():
            write_weights(partial / "model_ema.safetensors", engine, info)
    with comm.together("write a checkpoint"):
        if ema is not None:
            save_file({k: v.cpu() for k, v in ema.state().items()}, partial / _ema_name(world.rank))
    with comm.together("flush a checkpoint to the disk"):
        if world.local_rank == 0:
            for file in partial.rglob("*"):
                sync(file)
    with comm.together("complete a checkpoint"):
        if world.is_main:
            files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
            complete = State(**state, **describe_layout(engine, world), files=files)
            write_json(partial / "state.json", asdict(complete))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(folder)
            write_text(folder / "latest", final.name)
    return final


def write_weights(path: Path, engine: Any, info: ModelInfo) -> None:
    """The engine's whole weights in fp32 as one described file, written by rank 0. A collective."""
    weights = full_weights(engine)
    with comm.together(f"write {path.name}"):
        if weights:
            model_file.save(path, info, weights)


def find(folder: Path) -> list[Path]:
    """The whole checkpoints under ``folder``, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def read_state(checkpoint: Path) -> State:
    """A checkpoint's own description, after comparing every file's size with it.

    Raises:
        ValueError: not a checkpoint of ours, or files missing or cut short (which).
    """
    path = checkpoint / "state.json"
    try:
        state = State(**json.loads(path.read_text()))
    except OSError:
        raise ValueError(f"{checkpoint}: not a checkpoint of this trainer (it has no readable state.json)") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    for name, size in state.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{checkpoint}: damaged: {name} {what}, {size} were written; resume from another one")
    return state


def load(checkpoint: Path, engine: Any, ema: ShardedEMA | None, world: World, stream: dict[str, int]) -> State:
    """Bring engine and moving average back to where ``checkpoint`` left them. A collective.

    Args:
        stream: ``State``'s fields ``global_batch`` to ``total_steps``, as this run has them.

    Raises:
        RunError, ValueError: a damaged checkpoint, or one from another layout or another stream of images.
    """
    with comm.together("read a checkpoint"):
        state = read_state(checkpoint)
        for name, value in (describe_layout(engine, world) | stream).items():
            if getattr(state, name) != value:
                raise ValueError(
                    f"{checkpoint}: written with {name} {getattr(state, name)}, this run has {value}; a run goes on "
                    "only as it began. To begin anew from its weights, set model.initial_checkpoint to its "
                    "model.safetensors, and another output"
                )
        if ema is not None and not (checkpoint / _ema_name(world.rank)).is_file():
            raise ValueError(f"{checkpoint}: holds no moving average, but optim.ema_decay is set")
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if ema is not None:
        ema.load_state(load_file(checkpoint / _ema_name(world.rank)))
    return state


def abandon_after(folder: Path, step: int, world: World) -> list[str]:
    """Set aside checkpoints later than ``step``: a run that goes back must not meet them again. A collective.

    Returns:
        The new names, on rank 0.
    """
    renamed = []
    with comm.together("set later checkpoints aside"):
        if world.is_main:
            for later in (path for path in find(folder) if int(path.name.removeprefix("step-")) > step):
                aside = later.with_name(f"abandoned-{later.name}")
                shutil.rmtree(aside, ignore_errors=True)
                renamed.append(later.rename(aside).name)
    return renamed


def prune(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest ``keep_last`` and the best. For rank 0."""
    checkpoints = find(folder)
    keep = set(checkpoints[-keep_last:])
    if keep_best:
        scored = [(json.loads((c / "state.json").read_text())["top1"], c) for c in checkpoints]
        scored = [(top1, c) for top1, c in scored if top1 is not None]
        if scored:
            keep.add(max(scored)[1])
    for checkpoint in checkpoints:
        if checkpoint not in keep:
            shutil.rmtree(checkpoint)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _ema_name(rank: int) -> str:
    return f"ema-{rank:04d}.safetensors"


def _require_space(folder: Path, engine: Any, ema: ShardedEMA | None, world_size: int) -> None:
    """Refuse to begin what the disk cannot hold: masters, two moments and averages of all ranks, and whole copies."""
    shard = sum(master.numel() * 4 for master in masters(engine))
    # Stage 0 keeps one copy of the optimizer's state; the sharded stages keep one shard a rank.
    total = shard if engine.zero_optimization_stage() == 0 else shard * world_size
    copies = 3 + 2 + (2 if ema is not None else 0)
    needed = int(total * copies * _HEADROOM)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint needs about {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free; "
            "nothing was written, the last checkpoint is whole"
        )
