"""``kill -9`` at thirty random moments, saving included: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import runs
from tests.launching import Job

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


def newest(output: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in output.glob("checkpoints/step-*")), default=0)


def run_and_kill(job: Job, step: int, in_the_middle: bool, delay: float) -> None:
    """SIGKILL a run a little after it has saved ``step``, or ``in_the_middle`` of saving the step after that."""
    with runs.running(job, ranks=1) as run:
        run.wait_for(lambda: newest(job.output) >= step)
        if in_the_middle:
            run.wait_for(lambda: list(job.output.glob("checkpoints/.step-*")))
        time.sleep(delay)
        run.ranks()[0].kill()
        assert run.wait() == [-signal.SIGKILL]


def test_killed_thirty_times(tmp_path: Path, few_digits: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    ds = {"zero_optimization": {"stage": 1}}
    done = runs.train(Job(tmp_path / "run.yaml", tmp_path / "whole", ds), ranks=1)
    assert done.returncode == 0, done.stdout

    draw = random.Random(0)
    job = Job(tmp_path / "run.yaml", tmp_path / "killed", ds, resume="auto")
    in_the_middle_of_saving = 0
    for kill in range(KILLS):
        step = newest(job.output) + draw.randint(1, STEPS_BETWEEN)
        in_the_middle = kill % 2 == 1
        run_and_kill(job, step, in_the_middle, draw.uniform(0, 0.005 if in_the_middle else 0.05))
        in_the_middle_of_saving += bool(list(job.output.glob("checkpoints/.step-*")))
    done = runs.train(job, ranks=1)
    assert done.returncode == 0, done.stdout
    assert in_the_middle_of_saving, "no kill came while a checkpoint was being written"
    print(f"{in_the_middle_of_saving} of {KILLS} kills came while a checkpoint was being written")  # pytest -s

    for name in ("learngene", "learngene_ema"):
        wanted, found = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not list(job.output.glob("checkpoints/.step-*")), "what the kills left is cleared away"
    assert len(list(job.output.glob("checkpoints/step-*"))) == 3
