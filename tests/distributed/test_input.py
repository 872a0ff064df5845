"""The input over real processes: killed and resumed at other world sizes, and memory over many epochs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launching import REPOSITORY

STEPS = 30  # of 12 images: five epochs of 80 images, and a bit
Line = tuple[int, str, str]  # step, image, digest


class Rank:
    """One process of ``tests.distributed.input_worker``."""

    def __init__(self, data: Path, out: Path, rank: int, world: int, from_step: int, pause: float = 0.0) -> None:
        self.out = out
        command = [sys.executable, "-m", "tests.distributed.input_worker", data, out, "--rank", rank, "--world", world]
        command += ["--from-step", from_step, "--steps", STEPS, "--pause", pause]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([str(part) for part in command], cwd=REPOSITORY, env=environment)

    def lines(self) -> dict[int, Line]:
        """position -> what was seen there. A last line that the kill has cut is none."""
        text = self.out.read_text() if self.out.is_file() else ""
        rows = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {int(position): (int(step), image, digest) for step, position, image, digest in rows}

    def steps_done(self) -> int:
        """The first step of which not all lines are there."""
        return max((step for step, *_ in self.lines().values()), default=-1) + 1


def run(data: Path, folder: Path, world: int, from_step: int, kill_at: int | None) -> tuple[dict[int, Line], int]:
    """All ranks from a step on, to the end or until they are killed; what they saw, and the step to go on from."""
    pause = 0.1 if kill_at else 0.0
    ranks = [Rank(data, folder / f"{world}-{rank}.txt", rank, world, from_step, pause) for rank in range(world)]
    try:
        deadline = time.monotonic() + 120
        while kill_at and min(rank.steps_done() for rank in ranks) < kill_at:
            assert time.monotonic() < deadline, "the ranks do not get on"
            time.sleep(0.02)
        for rank in ranks:
            if kill_at:
                rank.process.send_signal(signal.SIGKILL)
            code = rank.process.wait(timeout=120)
            assert code == (-signal.SIGKILL if kill_at else 0)
    finally:
        for rank in ranks:
            rank.process.kill()
    seen: dict[int, Line] = {}
    for rank in ranks:
        assert not set(seen) & set(rank.lines()), "two ranks saw the same position"
        seen |= rank.lines()
    return seen, min(rank.steps_done() for rank in ranks)


def test_killed_and_resumed_on_one_two_and_three_ranks(few_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, _ = run(few_digits, tmp_path / "whole", 1, 0, None)
    assert sorted(whole) == list(range(12 * STEPS))
    assert len({digest for _, _, digest in whole.values()}) > 0.9 * len(whole), "repeats are drawn anew"

    parts: dict[int, Line] = {}
    step = 0
    for world, kill_at in ((1, 5), (2, 15), (3, None)):  # 5 and 15 steps of 12 are in the middle of 80 images
        seen, done = run(few_digits, tmp_path, world, step, kill_at)
        # A rank may have been ahead of the step that a checkpoint would hold: its lines come again, the same.
        for position in set(seen) & set(parts):
            assert seen[position] == parts[position]
        parts |= seen
        assert done >= (kill_at or STEPS) > step
        step = done if kill_at is None else kill_at
    assert parts == whole


MEMORY = """
import sys
import numpy as np, psutil, torch
from sws_dist.config import AugmentConfig, DataConfig
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.mixing import Mixing, erase
from sws_dist.data.recipe import Recipe

augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, mixup=0.8, cutmix=1.0)
listed = manifest.scan(sys.argv[1], "train")
data, cpu = DataConfig(root="", image_size=64, num_threads=2), torch.device("cpu")
positions = (np.arange(start, start + 16) for start in range(0, 50 * len(listed), 16))
order = sampler.TrainOrder(len(listed), 0)
mixing = Mixing(augment, 10, 0)
loader = pipeline.train_loader(listed, order, positions, Recipe(augment, 64), 0, data, cpu)
val_loader = pipeline.eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 32), data, cpu)
for batch in loader:
    mixing(erase(batch.images, batch.erase), batch.labels, batch.position)
    if (batch.position + 16) % len(listed) == 0:  # the end of an epoch, with its evaluation
        assert sum(len(batch.images) for batch in val_loader) == len(listed)
        print(psutil.Process().memory_info().rss // 2**10, flush=True)
"""


def test_memory_is_flat_over_fifty_epochs(few_digits: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(few_digits)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    kib = [int(line) for line in done.stdout.split()]
    assert len(kib) == 50
    print(f"resident MiB: {[round(x / 1024) for x in kib[::7]]}")  # shown by pytest -s
    growth = max(kib[40:]) - max(kib[10:20])
    # An epoch's images are 80 x 64 x 64 x 3 floats, 4 MiB: keeping them, or a pipeline an epoch, would show at once.
    assert growth < 15 * 1024, kib
