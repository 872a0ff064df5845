"""A step whose loss is NaN on one rank: skipped as if it had not been, its images named, one too many stops the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sws_dist.errors import RunError
from tests.distributed import poisoned
from tests.launching import Job, log

RUN = """
output: unused
model: MODEL
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: DECAY}
train: {epochs: 2, global_batch: 16, log_every: 1, skip_nonfinite: 2}
checkpoint: {keep_last: 10}
"""
POISONED = [3, 4, 6]
KINDS: dict[str, dict[str, Any]] = {
    f"zero{stage}{name}": {"zero_optimization": {"stage": stage}} | extra
    for name, extra in (("", {}), ("_bf16", {"bf16": {"enabled": True}}))
    for stage in range(4)
} | {"accumulated": {"zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 2}}
KINDS["batchnorm"] = {"zero_optimization": {"stage": 1}}
OURS = "{name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    """Train every kind with steps 3, 4 and 6 of 6 poisoned; there is a checkpoint after steps 2, 4, 5 and 6."""
    folder = tmp_path_factory.mktemp("nonfinite")
    text = RUN.replace("ROOT", str(few_digits))
    (folder / "run.yaml").write_text(text.replace("MODEL", OURS).replace("DECAY", "0.9"))
    (folder / "batchnorm.yaml").write_text(text.replace("MODEL", "{name: resnet10t}").replace("DECAY", "null"))
    jobs = []
    for kind, ds in KINDS.items():
        for steps in (2, 4, 6):  # the checkpoint after step 5 is the epoch's
            file = folder / ("batchnorm.yaml" if kind == "batchnorm" else "run.yaml")
            job = Job(file, folder / kind, ds, {"train.max_steps": steps}, resume="auto")
            jobs.append((job, POISONED))
    ended, printed = poisoned.train(jobs)
    assert [outcome.traceback for outcome in ended] == ["", ""], printed[-6000:]
    (folder / "said.txt").write_text(printed)
    return folder


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Read weights, optimizer state and averages of all ranks."""
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert files
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_everything_as_it_was(folder: Path, kind: str) -> None:
    for before, after in ((2, 4), (5, 6)):
        old, new = (saved(folder / kind, step) for step in (before, after))
        assert old.keys() == new.keys()
        assert [key for key in old if not torch.equal(old[key], new[key])] == []
    old, new = (saved(folder / kind, step) for step in (4, 5))
    assert any(not torch.equal(old[key], new[key]) for key in old), "the good step in between was not taken"


def test_its_images_are_written_down(folder: Path, few_digits: Path) -> None:
    for kind in KINDS:
        files = sorted((folder / kind).glob("nonfinite-step-*.json"))
        assert [int(file.stem[-8:]) for file in files] == POISONED
        found = json.loads(files[0].read_text())
        assert found["step"] == 3
        assert found["skipped"]
        assert [rank["loss"] == "nan" for rank in found["ranks"]] == [False, True]
        for rank in found["ranks"]:
            assert len(rank["images"]) == 8
            assert all((few_digits / "train" / image).is_file() for image in rank["images"])
        assert len({image for rank in found["ranks"] for image in rank["images"]}) == 16
    said = (folder / "said.txt").read_text()
    assert said.count("the loss is nan at step 4 on rank 1") == len(KINDS)


def test_one_too_many_in_a_row_stops_the_run(folder: Path) -> None:
    job = Job(folder / "run.yaml", folder / "stopped", KINDS["zero2"])
    ended, _ = poisoned.train([(job, [3, 6, 7, 8])])
    for outcome in ended:
        assert isinstance(outcome.error, RunError)
        assert "the loss is nan at step 8 on rank 1" in str(outcome.error)
        assert "after 2 skipped steps (train.skip_nonfinite)" in str(outcome.error)
    assert len(log(job.output)) >= 8
