"""Write checkpoints while training goes on.

``save`` copies what this rank holds to host memory; a thread writes, hashes and flushes the copy. ``complete``
gives the checkpoint its name, once every rank has written: until then it is none. All collectives are in these two,
which the training loop calls, none is in the thread.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sws_dist.atomic import atomic_write_json, fsync_path
from sws_dist.checkpoint.checkpoint import (
    VERSION,
    CheckpointState,
    describe_layout,
    prune_checkpoints,
    read_state,
)
from sws_dist.checkpoint.folders import FolderKind, delete_checkpoint, kind_of
from sws_dist.checkpoint.model_file import ModelInfo
from sws_dist.checkpoint.safetensors_stream import FileDigest
from sws_dist.checkpoint.shards import HostCopy, Shard, collect_shard, shard_name
from sws_dist.config.schema import CheckpointConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.errors import RunError
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.loss_scale import loss_scaler_state
from sws_dist.zero.partition import optimizer_steps, whole_shapes
from sws_dist.zero.protocol import ZeroEngine

_HEADROOM = 1.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    partial: Path
    """Its folder, under a name that is no checkpoint's."""
    final: Path
    state: CheckpointState
    """What ``state.json`` will hold, but for the files."""
    shard: str
    """File name of this rank's part."""
    digest: Future[FileDigest | None]
    """Done when this part is on the disk."""


class CheckpointWriter:
    """Write a run's checkpoints under ``folder``, one at a time, and delete those that are not to be kept.

    Args:
        newest: the checkpoint that the run goes on from, if any.
        before_decay: the newest checkpoint up to this step is kept, if it is given.
    """

    def __init__(
        self,
        folder: Path,
        engine: ZeroEngine,
        ema: ShardedEMA | None,
        world: World,
        config: CheckpointConfig,
        newest: Path | None,
        before_decay: int | None,
    ) -> None:
        self.newest = newest
        self._before_decay = before_decay
        self._folder, self._engine, self._ema, self._world, self._config = folder, engine, ema, world, config
        self._host_copy = HostCopy()
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread writes."""
        return self._pending is not None and not self._pending.digest.done()

    @property
    def has_failed(self) -> bool:
        """True if this rank could not write its part: ``complete`` will say why, on all ranks."""
        pending = self._pending
        return pending is not None and pending.digest.done() and pending.digest.exception() is not None

    def save(self, info: ModelInfo, state: dict[str, Any], *, wait: bool) -> None:
        """Begin a checkpoint, after completing the one before; the last good one stays until this one is whole.

        A collective.

        Args:
            state: the fields of ``CheckpointState`` from ``step`` to ``total_steps``.
            wait: return when it is complete; nothing is copied then.
        """
        self.complete()
        final = self._folder / f"step-{state['step']:08d}"
        if broadcast_from_rank0(self._world.is_rank_zero and self._is_newest(final)):
            self._add_scores(final, info, state)
            return
        described, shard = self._describe(info, state), collect_shard(self._engine, self._ema)
        partial, name = final.with_name(f".{final.name}"), shard_name(self._world.rank, self._world.size)
        background = self._config.background and not wait
        with raise_on_all_ranks("prepare a checkpoint"):
            if self._world.is_rank_zero:
                assert shard is not None
                self._prepare_folder(partial, final, shard)
            if background and shard is not None:
                shard = self._host_copy.of(shard)
        digest = self._thread.submit(_write, shard, partial / name)
        self._pending = _Pending(partial, final, described, name, digest)
        if not background:
            self.complete()

    def complete(self) -> None:
        """Wait for all ranks to have written their parts, and make the checkpoint valid. A collective.

        Raises:
            RunError: a rank could not write. Nothing is pending after that, nor where nothing was before.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with raise_on_all_ranks("write a checkpoint"):
            digest = pending.digest.result()
        listed = gather_on_rank0((pending.shard, digest))
        with raise_on_all_ranks("complete a checkpoint"):
            if listed is not None:
                files = {name: digest for name, digest in listed if digest is not None}
                atomic_write_json(pending.partial / "state.json", asdict(replace(pending.state, files=files)))
                pending.partial.rename(pending.final)  # the commit point: from here on the checkpoint is valid
                fsync_path(self._folder)
        self.newest = pending.final
        self.prune()

    def check(self, status: StepStatus) -> None:
        """Complete the checkpoint that is pending, if any, as soon as no rank writes any more. A collective.

        Raises:
            RunError: a rank could not write.
        """
        if status.failed or not status.writing:
            self.complete()

    def complete_after_failure(self) -> None:
        """Complete the pending checkpoint, if any, of a run that ends with an error of its own. A collective."""
        try:
            self.complete()
        except (RunError, OSError) as error:
            log.error("%s", error)

    def prune(self) -> None:
        """Delete checkpoints that are no longer to be kept, and what kills have left."""
        keep = self._config
        if self._world.is_rank_zero:
            try:
                prune_checkpoints(self._folder, keep.keep_last, keep.keep_best, self._before_decay)
            except OSError as error:  # the newest checkpoint is whole: what is left of old ones costs room, no more
                log.warning("an old checkpoint could not be deleted: %s", error)

    def _describe(self, info: ModelInfo, state: dict[str, Any]) -> CheckpointState:
        """Return what ``state.json`` will hold, but for the files: what is true now, not when they are written."""
        return CheckpointState(
            version=VERSION,
            **state,
            **describe_layout(self._engine, self._world),
            optimizer_steps=optimizer_steps(self._engine),
            loss_scaler=loss_scaler_state(self._engine),
            model=asdict(info),
            shapes=whole_shapes(self._engine),
            files={},
        )

    def _is_newest(self, final: Path) -> bool:
        """Return True for the checkpoint that the run has just gone on from: a stop had put its scores off.

        Another one under this name is of another run, and in the way. Only rank 0 may look: a name that is not there
        yet would be remembered as absent by the file system of another node (NFS).
        """
        if self.newest is None or kind_of(final) is not FolderKind.CHECKPOINT:
            return False
        return final.resolve() == self.newest.resolve()

    def _add_scores(self, checkpoint: Path, info: ModelInfo, state: dict[str, Any]) -> None:
        """Add an evaluation's scores to a checkpoint that was saved without."""
        with raise_on_all_ranks("complete a checkpoint"):
            if self._world.is_rank_zero and state["top1"] is not None:
                scores = {key: state[key] for key in ("seconds", "rank_seconds", "top1", "best_top1", "history")}
                scored = replace(read_state(checkpoint), model=asdict(info), **scores)
                atomic_write_json(checkpoint / "state.json", asdict(scored))
        self.newest = checkpoint
        self.prune()

    def _prepare_folder(self, partial: Path, final: Path, shard: Shard) -> None:
        """Create the folder that all ranks write into.

        Raises:
            ValueError: something else has the checkpoint's name.
            OSError: the disk has no room for the shards of all ranks, if all are like this one.
        """
        if final.exists():
            raise ValueError(f"{final}: in the way of a checkpoint, and not one of this run; move it elsewhere")
        self._folder.mkdir(parents=True, exist_ok=True)
        if kind_of(partial) is FolderKind.LEFTOVER:
            delete_checkpoint(partial)
        partial.mkdir(exist_ok=True)
        # Stage 0 keeps one copy of the optimizer's state; the sharded stages keep one shard a rank.
        num_shards = 1 if self._engine.zero_optimization_stage() == 0 else self._world.size
        needed, free = int(shard.num_bytes * num_shards * _HEADROOM), shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                f"{self._folder}: a checkpoint needs about {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB "
                "are free; nothing was written, the last checkpoint is whole"
            )


def _write(shard: Shard | None, path: Path) -> FileDigest | None:
    """Write a shard, if there is one. Runs in the thread."""
    try:
        return None if shard is None else shard.write(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}); the last checkpoint is whole") from None
