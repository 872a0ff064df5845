"""Told to stop by a signal, a run finishes its step, saves, and goes on later as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sws_dist.errors import EXIT_REQUEUE
from tests import runs
from tests.launching import REPOSITORY, Job, log, losses, running, train_arguments

# Evaluating one image at a time takes long enough to be interrupted.
RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], drop_path: 0.2, kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {re_prob: 0.5, mixup: 0.8}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 2, global_batch: 16, log_every: 1, eval_batch: 1}
checkpoint: {keep_last: 10}
"""
EXIT_INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
EPOCH = 91  # steps until all 1,442 images have been seen
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))
    return folder


def saved(job: Job) -> list[int]:
    folders = sorted(job.output.glob("checkpoints/step-*"))
    return [int(folder.name.removeprefix("step-")) for folder in folders]


def gone(processes: list[psutil.Process], timeout_s: float = 600) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive


def test_stopped_three_times_and_resumed_equals_undisturbed(folder: Path) -> None:
    """Each signal on its own way: to one rank, through the launcher, from the terminal, and during evaluation."""
    whole = Job(folder / "run.yaml", folder / "whole", ZERO2)
    done = runs.train(whole, ranks=2)
    assert done.returncode == 0, done.stdout

    job = replace(whole, output=folder / "parts", resume="auto")
    with running(job, ranks=2) as run:  # srun and scancel signal the ranks themselves; here even one is enough
        run.wait_for_step(10)
        run.ranks()[1].send_signal(signal.SIGUSR1)
        assert run.process.wait(timeout=600) == EXIT_REQUEUE
        assert "told to stop (SIGUSR1 on rank 1)" in run.said()
        assert "Traceback" not in run.said()
    assert len(saved(job)) == 1
    assert 10 <= saved(job)[0] < EPOCH - 10

    # DeepSpeed's launcher passes SIGTERM on, rank after rank, and reports 1 whatever they say. The last step of the
    # epoch is in the log, its scores are not.
    with running(job, ranks=2) as run:
        run.wait_for_step(EPOCH)
        run.processes()[1].terminate()
        assert run.process.wait(timeout=600) == 1
        assert f"told to stop (during the evaluation): saved at step {EPOCH} of" in run.said()
        assert "Traceback" not in run.said()
    assert saved(job)[-1] == EPOCH
    assert not any("val/top1" in entry for entry in log(job.output))

    with running(job, ranks=2) as run:  # Ctrl-C reaches launchers and ranks; the launcher sends SIGTERM on top
        run.wait_for_step(100)
        ranks = run.ranks()
        os.killpg(run.process.pid, signal.SIGINT)
        gone(ranks)
        assert re.search(r"told to stop \((SIGINT|SIGTERM) on rank 0\)", run.said())
    assert saved(job)[-1] >= 100

    scored = json.loads((job.output / "checkpoints" / f"step-{EPOCH:08d}" / "state.json").read_text())
    assert scored["top1"] == scored["history"][-1]["val/top1"]

    done = runs.train(job, ranks=2)
    assert done.returncode == 0, done.stdout
    assert losses(job.output) == losses(whole.output)
    assert [e["val_ema/loss"] for e in log(job.output) if "val/top1" in e] == [
        e["val_ema/loss"] for e in log(whole.output) if "val/top1" in e
    ]
    for name in ("learngene", "learngene_ema"):
        ours, theirs = (load_file(path / f"{name}.safetensors") for path in (job.output, whole.output))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_during_start_up_it_leaves_at_once(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, *train_arguments(Job(folder / "run.yaml", folder / f"early{number}", ZERO2))]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # in the midst of importing torch
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_REQUEUE, said
    assert f"{number.name}: stopped at once" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_stops_at_once_even_where_a_rank_hangs(folder: Path) -> None:
    with runs.running(Job(folder / "run.yaml", folder / "twice", ZERO2), ranks=2) as run:
        run.wait_for_step(5)
        waiting, hanging = run.ranks()
        hanging.suspend()
        waiting.send_signal(signal.SIGINT)
        run.wait_for(lambda: "once more: stop at once" in run.said())
        time.sleep(1.5)  # within a second it would count as the same Ctrl-C, from the terminal and from the launcher
        assert run.group.exitcodes() == [None, None]
        waiting.send_signal(signal.SIGINT)
        run.wait_for(lambda: "SIGINT again: stopped at once" in run.said())
        run.wait_for(lambda: run.group.exitcodes()[0] == EXIT_INTERRUPTED)
