"""``kill -9`` at thirty random moments, saving included: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import REPOSITORY, Job

KILLS, STEPS_BETWEEN = 30, 8
RUN = f"""
output: unused
model: {{name: sws_vit, schedule: [2, 1], drop_path: 0.2, kwargs: {{patch_size: 8, embed_dim: 32, num_heads: 2}}}}
data: {{root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}}
augment: {{mixup: 0.8}}
optim: {{lr: 1e-3, lr_batch: null, ema_decay: 0.9}}
train: {{epochs: {KILLS * STEPS_BETWEEN + 10}, global_batch: 80, log_every: 10, eval_every: 1000}}
checkpoint: {{keep_last: 3, keep_best: false}}
"""


def start(job: Job) -> subprocess.Popen[str]:
    """One process; an epoch is one step, and each is saved."""
    command = [sys.executable, "launcher/train.py", "--config", str(job.config), "--resume", "auto"]
    command += ["--deepspeed_config", str(job.ds_file()), "--set", f"output={job.output}"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(output: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in output.glob("checkpoints/step-*")), default=0)


def kill_after(process: subprocess.Popen[str], output: Path, step: int, delay: float) -> None:
    """SIGKILL a little after ``step`` has been saved."""
    deadline = time.monotonic() + 120
    while newest(output) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_thirty_times(tmp_path: Path, few_digits: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    ds = {"zero_optimization": {"stage": 1}}
    whole = start(Job(tmp_path / "run.yaml", tmp_path / "whole", ds))
    assert whole.wait(timeout=300) == 0, whole.communicate()[0]

    draw = random.Random(0)
    job = Job(tmp_path / "run.yaml", tmp_path / "killed", ds)
    in_the_middle_of_saving = 0
    for _ in range(KILLS):
        step = newest(job.output) + draw.randint(1, STEPS_BETWEEN)
        kill_after(start(job), job.output, step, draw.uniform(0, 0.05))
        in_the_middle_of_saving += bool(list(job.output.glob("checkpoints/.step-*")))
    last = start(job)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert in_the_middle_of_saving, "no kill came while a checkpoint was being written"
    print(f"{in_the_middle_of_saving} of {KILLS} kills came while a checkpoint was being written")  # pytest -s

    for name in ("learngene", "learngene_ema"):
        wanted, found = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not list(job.output.glob("checkpoints/.step-*")), "what the kills left is cleared away"
    assert len(list(job.output.glob("checkpoints/step-*"))) == 3
