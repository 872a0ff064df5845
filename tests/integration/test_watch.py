"""A rank that stands still, dies or waits for data is named; what cannot be written ends all ranks; nothing leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sws_dist.data import manifest, sampler
from sws_dist.errors import EXIT_PEER_LOST
from tests import runs
from tests.launching import Job, log, running

# 500 epochs of 5 steps, none of which evaluates or saves.
RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1, prefetch: 1}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 500, global_batch: 16, log_every: 1, eval_every: 500, timeout_s: 16}
checkpoint: {every: 500}
"""
ZERO2 = {"zero_optimization": {"stage": 2}}
SECRET = "hunter2-do-not-tell"


@pytest.fixture
def job(tmp_path: Path, few_digits: Path) -> Job:
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    return Job(tmp_path / "run.yaml", tmp_path / "run", ZERO2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_rank_is_named_and_ends_the_run(job: Job, victim: int) -> None:
    with runs.running(job, ranks=2) as run:
        run.wait_for_step(5)
        ranks = run.ranks()
        ranks[victim].suspend()
        name = f"rank {victim} on {socket.gethostname()} (process {ranks[victim].pid}): silent, last seen"
        run.wait_for(lambda: re.search(rf"^warning: no progress for \d+ s: {re.escape(name)}", run.said(), re.M))
        run.wait_for(lambda: run.errors())
        assert name in run.errors()[0]
        assert "train.timeout_s 16" in run.errors()[0]
        survivor = f"rank {1 - victim} came to \\w+ number \\d+ of .*, rank {victim} left no record; "
        assert re.search(survivor, run.errors()[0])
        (record,) = job.output.glob("crash/*/*.txt")
        assert record.name == f"rank-{1 - victim:05d}.txt"
        assert "in _train_step" in record.read_text()
        run.wait_for(lambda: run.group.exitcodes()[1 - victim] == EXIT_PEER_LOST)
        assert "Traceback" not in run.said()


def test_a_killed_rank_is_named(job: Job) -> None:
    """Under DeepSpeed's launcher, which ends the others when one has gone."""
    with running(job, ranks=2) as run:
        run.wait_for_step(5)
        victim = run.ranks()[1]
        victim.send_signal(signal.SIGKILL)
        assert run.process.wait(timeout=600) != 0
        assert len(run.errors()) == 1
        assert "lost the connection to other ranks" in run.errors()[0]
        assert f"rank 1 on {socket.gethostname()} (process {victim.pid}): silent" in run.errors()[0]
        assert "Traceback" not in run.said()


def test_a_rank_that_waits_for_data_is_named(job: Job, few_digits: Path, tmp_path: Path) -> None:
    """An image of rank 1 turns into a pipe that nobody writes to: what a hanging file server looks like."""
    root = tmp_path / "data"
    shutil.copytree(few_digits, root)
    images = manifest.scan(root, "train")
    order = sampler.TrainOrder(len(images), seed=0)
    file = images.file(int(order.images(sampler.micro_batch_positions(40, 16, 1, 2))[3]))
    sets = {"data.root": str(root), "train.timeout_s": 40}
    with runs.running(Job(job.config, job.output, job.ds, sets), ranks=2) as run:
        run.wait_for_step(15)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        file.rename(tmp_path / "image")
        os.link(pipe, file)
        run.wait_for(
            lambda: re.search(r"^warning: no progress for \d+ s: rank 1 .*: alive, waiting for data", run.said(), re.M)
        )
        (tmp_path / "image").replace(file)
        pipe.open("w").close()
        run.wait_for(
            lambda: re.search(r"^warning: step \d+ took [\d.]+ s instead of [\d.]+ s: rank 1 waited", run.said(), re.M)
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_under_the_log_ends_all_ranks(job: Job, disk: Path) -> None:
    with runs.running(Job(job.config, disk / "run", job.ds), ranks=2) as run:
        run.wait_for_step(5)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=4k"], stderr=subprocess.DEVNULL)
        assert run.wait() == [1, 1]
        (disk / "filler").unlink()
        assert len(run.errors()) == 1
        assert "the log cannot be written (No space left on device)" in run.errors()[0]
        assert "cli.py" not in run.said(), "a traceback of ours; TensorBoard's thread prints one of its own"


def test_outputs_keep_to_the_umask_and_hold_no_secret(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@proxy")
    sets = {"train.epochs": 2, "train.eval_every": 1, "checkpoint.every": 1, "optim.ema_decay": 0.9}
    before = os.umask(0o027)
    try:
        done = runs.train(Job(job.config, job.output, job.ds, sets), ranks=2)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stdout
    paths = [job.output, *job.output.rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o750"}
    assert not [path for path in paths if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout
    assert not list((job.output / "heartbeats").iterdir())
    assert json.loads((job.output / "metrics.json").read_text())["steps"] == len(log(job.output)) - 2
