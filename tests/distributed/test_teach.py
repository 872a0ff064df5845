"""Logits that ``sws teach`` has stored train like the teacher itself, at any world size, and no others are taken."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.models import create_model
from tests import ranks as pool
from tests import runs
from tests.launching import Job, losses

# Epochs of 80 positions in steps of 32: both seams lie inside a step. All that depends on the micro-batch is on, and
# each image is decoded once for two crops, so the three epochs are one and a half passes.
RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 1], drop_path: 0.1, kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {hflip: 0.5, re_prob: 0.5, mixup: 0.8, cutmix: 1.0, smoothing: 0.1, num_crops: 2}
distill: {teacher: TEACHER, tau: 2.0}
optim: {lr: 3e-3, lr_batch: null}
train: {epochs: 3, global_batch: 32, log_every: 1, eval_every: 3, seed: 3}
checkpoint: {keep_last: 9}
"""
EPOCHS, STEPS = 3, 7
DS: dict[str, Any] = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    """A config, its data, and a teacher that is sure of what it says, though it has learned nothing."""
    folder = tmp_path_factory.mktemp("teach")
    shutil.copytree(few_digits, folder / "data")
    torch.manual_seed(0)
    teacher = create_model("resnet10t", num_classes=10)
    teacher.fc.weight.data *= 40
    info = ModelInfo("model", "resnet10t", {}, 10, {"mean": [0.4] * 3, "std": [0.5] * 3})
    save_model_file(folder / "teacher.safetensors", info, teacher.state_dict())
    text = RUN.replace("ROOT", str(folder / "data")).replace("TEACHER", str(folder / "teacher.safetensors"))
    (folder / "run.yaml").write_text(text)
    return folder


def teach(folder: Path, out: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    arguments = ("--config", str(folder / "run.yaml"), "--out", str(out), "--batch", "16", *arguments)
    return pool.script("launcher/teach.py", *arguments, world=ranks)


@pytest.fixture(scope="module")
def logits(folder: Path) -> Path:
    """The logits of all classes, written by two ranks."""
    done = teach(folder, folder / "logits", ranks=2)
    assert done.returncode == 0, done.stdout
    assert "the last pass over the images ends after 1 of its 2 epochs" in done.stdout
    assert "3 epochs of 80 images, 10 of 10 classes, 21 bytes an image, 5.04 kB in all" in done.stdout
    return folder / "logits"


@pytest.fixture(scope="module")
def online(folder: Path) -> Job:
    """A run that asks the teacher itself."""
    job = Job(folder / "run.yaml", folder / "online", DS)
    done = runs.train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(losses(job.output)) == STEPS
    return job


def stored(folder: Path, logits: Path, output: Path, **sets: Any) -> Job:
    return Job(folder / "run.yaml", output, DS, {"distill.teacher": None, "distill.logits": logits, **sets})


def refused(job: Job, ranks: int = 1) -> str:
    done = runs.train(job, ranks)
    assert done.returncode == 1, done.stdout[-4000:]
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize("ranks", [1, 2])
def test_stored_logits_train_like_the_teacher(
    folder: Path, logits: Path, online: Job, tmp_path: Path, ranks: int
) -> None:
    job = stored(folder, logits, tmp_path / "run")
    assert runs.train(job, ranks).returncode == 0
    expected = losses(online.output)
    np.testing.assert_allclose(losses(job.output), expected, rtol=1e-3)
    assert np.ptp(expected) > 0.1 * max(expected), "too even for this comparison to mean anything"
    metrics = [json.loads((output / "metrics.json").read_text()) for output in (job.output, online.output)]
    assert [found["flops_teacher"] > 0 for found in metrics] == [False, True]


def test_a_run_goes_on_at_another_world_size(folder: Path, logits: Path, online: Job, tmp_path: Path) -> None:
    job = stored(folder, logits, tmp_path / "run", **{"train.max_steps": 4})
    assert runs.train(job, ranks=2).returncode == 0
    left = shutil.copytree(logits, tmp_path / "logits")
    (left / "epoch-00000.safetensors").unlink()  # it is over
    go_on = replace(job, sets=job.sets | {"train.max_steps": None}, resume="auto")
    message = refused(replace(go_on, sets=go_on.sets | {"distill.logits": left}))
    assert f'this config has distill.logits "{left}"' in message
    assert runs.train(go_on, ranks=1).returncode == 0
    np.testing.assert_allclose(losses(job.output), losses(online.output), rtol=1e-3)


def test_truncated_logits_are_smaller_and_close(folder: Path, online: Job, tmp_path: Path) -> None:
    done = teach(folder, tmp_path / "logits", "--top-k", "4")
    assert "4 of 10 classes, 15 bytes an image" in done.stdout
    job = stored(folder, tmp_path / "logits", tmp_path / "run", **{"train.max_steps": 1})
    assert runs.train(job, ranks=1).returncode == 0
    first, exact = losses(job.output)[0], losses(online.output)[0]
    assert 1e-4 < abs(first - exact) < 0.2 * exact


def test_one_rank_writes_what_two_have_written(folder: Path, logits: Path, tmp_path: Path) -> None:
    assert teach(folder, tmp_path / "logits").returncode == 0
    for file in sorted(logits.glob("*.safetensors")):
        ours, theirs = load_file(tmp_path / "logits" / file.name), load_file(file)
        assert ours.keys() == theirs.keys() == {"values", "images"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_interrupted_teach_goes_on_with_what_is_whole(folder: Path, logits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(logits, tmp_path / "logits")
    kept, damaged, missing = sorted(copy.glob("*.safetensors"))
    written = kept.stat().st_mtime_ns
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    missing.unlink()
    (copy / f".{missing.name}.1.tmp").write_bytes(content[:100])  # what a kill leaves
    done = teach(folder, copy)
    assert done.returncode == 0
    assert f"warning: {damaged}: cannot be used (its checksum is wrong)" in done.stdout
    assert "1 of 3 epochs are there already" in done.stdout
    assert kept.stat().st_mtime_ns == written
    for file in (kept, damaged, missing):
        assert file.read_bytes() == (logits / file.name).read_bytes()


def test_a_killed_teach_leaves_whole_files_only(folder: Path, logits: Path, tmp_path: Path) -> None:
    out = tmp_path / "logits"
    arguments = ("--config", str(folder / "run.yaml"), "--out", str(out), "--batch", "16", "--set", "train.epochs=500")
    with pool.start_script("launcher/teach.py", *arguments) as group:
        while not (out / "epoch-00002.safetensors").is_file():
            assert group.exitcodes() == [None], group.printed()
        group.kill()
    for file in out.glob("epoch-*.safetensors"):
        if (logits / file.name).is_file():
            assert file.read_bytes() == (logits / file.name).read_bytes()
    assert runs.train(stored(folder, out, tmp_path / "run"), ranks=1).returncode == 0


def test_other_logits_are_refused(folder: Path, logits: Path, tmp_path: Path) -> None:
    """Seed, augmentation, teacher, micro-batch, and a missing epoch; tests/unit/test_stored_logits.py has them all."""
    job = stored(folder, logits, tmp_path / "run", **{"train.seed": 4, "augment.hflip": 0.0, "data.image_size": 40})
    message = refused(job, ranks=2)
    assert f"distill.logits {logits}: not the logits of this run: augment.hflip is 0.0, in the folder 0.5; " in message
    assert "data.image_size is 40, in the folder 32; train.seed is 4, in the folder 3. Set that" in message
    other = tmp_path / "other.safetensors"
    content = (folder / "teacher.safetensors").read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = refused(stored(folder, logits, tmp_path / "run", **{"distill.teacher": other}))
    assert "not the logits of this run: weights of the teacher is " in message
    job = stored(folder, logits, tmp_path / "run")
    assert "images in a micro-batch is 32, in the folder 16" in refused(replace(job, ds={}))
    message = refused(stored(folder, logits, tmp_path / "run", **{"train.epochs": 5}))
    assert "2 of the run's epochs are not there, the first is epoch-00003.safetensors; sws teach" in message
    assert "not a folder of logits" in refused(stored(folder, tmp_path, tmp_path / "run"))


def test_a_damaged_shard_is_refused_on_all_ranks(folder: Path, logits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(logits, tmp_path / "logits")
    damaged = copy / "epoch-00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    message = refused(stored(folder, copy, tmp_path / "run"), ranks=2)
    assert f"{damaged}: cannot be used (its checksum is wrong); sws teach with the same arguments" in message


def test_an_image_that_went_bad_since_stops_all_ranks(folder: Path, logits: Path, tmp_path: Path) -> None:
    """Another image takes its place in the run, and its logits are not those that are stored."""
    job = stored(folder, logits, tmp_path / "run", **{"train.max_steps": 1, "data.max_bad_share": 1.0})
    assert runs.train(job, ranks=2).returncode == 0
    victim = sorted((folder / "data" / "train").rglob("*.jpg"))[3]
    content = victim.read_bytes()
    try:
        victim.write_bytes(content[:200])
        job = replace(job, sets=job.sets | {"train.max_steps": None}, resume="auto")
        message = refused(job, ranks=2)
    finally:
        victim.write_bytes(content)
    assert f"its logits in {logits} are of {victim.relative_to(folder / 'data' / 'train')}" in message


def test_teach_refuses_what_it_cannot_store(folder: Path, logits: Path, tmp_path: Path) -> None:
    def message(*arguments: str, out: Path = tmp_path / "logits") -> str:
        done = teach(folder, out, *arguments)
        assert done.returncode == 1
        (found,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        return found

    assert "distill.teacher is null" in message("--set", "distill.teacher=null")
    assert "--batch 16: expected a divisor of train.global_batch 40" in message("--set", "train.global_batch=40")
    assert f"{logits} holds other logits: train.seed is 9, in the folder 3" in message(
        "--set", "train.seed=9", out=logits
    )
    blind = tmp_path / "nan.safetensors"
    teacher = create_model("resnet10t", num_classes=10)
    teacher.fc.bias.data[3] = torch.nan
    save_model_file(blind, ModelInfo("model", "resnet10t", {}, 10), teacher.state_dict())
    assert "are not finite" in message("--set", f"distill.teacher={blind}")
