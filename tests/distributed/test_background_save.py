"""A checkpoint that is written while training goes on is the one that a run writes which waits; or there is none."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sws_dist.checkpoint.checkpoint import verify
from sws_dist.checkpoint.folders import list_checkpoints
from sws_dist.checkpoint.shards import Shard
from sws_dist.errors import RunError
from sws_dist.trainer import Trainer
from tests import ranks, runs
from tests.distributed import poisoned
from tests.launching import Job, losses

EPOCH = 5
RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 1], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 3, global_batch: 16, log_every: 1, eval_every: 3}
checkpoint: {keep_last: 9, keep_best: false}
"""


@dataclass
class Seen:
    """What a slow run saw of the checkpoint of its first epoch."""

    while_writing: list[str]
    afterwards: list[str]
    error: str


def hold_writes(trainer: Trainer, steps: int) -> list[str]:
    """Let rank 1's thread wait with the first checkpoint until so many steps are taken. Returns what is there then."""
    seen: list[str] = []
    write = Shard.write

    def write_late(shard: Shard, path: Path) -> Any:
        if trainer.parts.world.rank == 1 and path.parent.name == f".{step(EPOCH)}":
            while trainer.step < steps:
                time.sleep(0.001)
            time.sleep(0.2)
            seen.extend(sorted(folder.name for folder in path.parent.parent.iterdir()))
        return write(shard, path)

    Shard.write = write_late  # type: ignore[assignment, method-assign]
    return seen


def hold(trainer: Trainer) -> list[str]:
    return hold_writes(trainer, EPOCH + 2)


def fail_after_saving(trainer: Trainer) -> list[str]:
    poisoned.poison(trainer, [EPOCH + 1])
    return hold_writes(trainer, EPOCH + 1)


def fill_the_disk(trainer: Trainer) -> list[str]:
    """Refuse rank 1 files of more than 20 kB, which its shard is and its heartbeat is not."""
    if trainer.parts.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return []


def undisturbed(trainer: Trainer) -> list[str]:
    return []


def train(job: Job, disturb: Callable[[Trainer], list[str]]) -> Seen:
    trainer, error, write = runs.trainer(job), "", Shard.write
    seen = disturb(trainer)
    try:
        trainer.run()
    except RunError as raised:
        error = str(raised)
    finally:
        Shard.write = write  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Seen(seen, [path.name for path in list_checkpoints(job.output / "checkpoints")], error)


def train_each(jobs: list[tuple[Job, Callable[[Trainer], list[str]]]]) -> list[Seen]:
    return [train(*each) for each in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("background")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, list[Seen]]:
    """What each rank saw of every run."""
    zero2 = {"zero_optimization": {"stage": 2}}
    kinds = {"waited": undisturbed, "slow": hold, "failed": fail_after_saving, "full": fill_the_disk}
    jobs = [
        (Job(folder / "run.yaml", folder / name, zero2, {"checkpoint.background": name != "waited"}), disturb)
        for name, disturb in kinds.items()
    ]
    for job, _ in jobs:
        job.ds_file()
    return dict(zip(kinds, zip(*ranks.run(train_each, jobs), strict=True), strict=True))


def step(number: int) -> str:
    return f"step-{number:08d}"


def described(folder: Path, number: int) -> dict[str, Any]:
    """Read what a checkpoint says, but for what differs from run to run."""
    state = json.loads((folder / "checkpoints" / step(number) / "state.json").read_text())
    del state["seconds"], state["rank_seconds"], state["model"]["provenance"]
    state["history"] = [point["step"] for point in state["history"]]
    return state


def test_it_holds_what_was_there_when_it_was_begun(folder: Path, seen: dict[str, list[Seen]]) -> None:
    """The file digests of all ranks are part of what is compared."""
    assert losses(folder / "slow") == losses(folder / "waited")
    for number in (EPOCH, 2 * EPOCH, 3 * EPOCH):
        assert described(folder / "slow", number) == described(folder / "waited", number)
    assert verify(folder / "slow" / "checkpoints" / step(EPOCH)) is None


def test_it_is_none_until_all_ranks_have_written(seen: dict[str, list[Seen]]) -> None:
    assert seen["slow"][1].while_writing == [f".{step(EPOCH)}"]
    assert seen["slow"][0].afterwards == [step(EPOCH), step(2 * EPOCH), step(3 * EPOCH)]


def test_a_run_that_fails_meanwhile_completes_it(folder: Path, seen: dict[str, list[Seen]]) -> None:
    for rank in seen["failed"]:
        assert f"the loss is nan at step {EPOCH + 1} on rank 1" in rank.error
        assert rank.afterwards == [step(EPOCH)]
    assert verify(folder / "failed" / "checkpoints" / step(EPOCH)) is None


def test_a_rank_that_cannot_write_ends_all_ranks(folder: Path, seen: dict[str, list[Seen]]) -> None:
    for rank in seen["full"]:
        assert "shard-00001-of-00002.safetensors: cannot be written ([Errno 27] File too large" in rank.error
        assert "the last checkpoint is whole (rank 1 of 2, while it tried to write a checkpoint)" in rank.error
        assert rank.afterwards == []
    assert EPOCH < len(losses(folder / "full")) <= EPOCH + 3, "it ends with one of the next steps"
