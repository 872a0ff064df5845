"""A user's mistake ends every rank with one clear message and exit code 1, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.checkpoint.weight_file import load_tensors
from sws_dist.learngene.file import describe_model
from sws_dist.models import create_model
from tests import ranks, runs
from tests.launching import Job, log, train, train_alone, train_arguments

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 4, global_batch: 16, log_every: 1}
"""
PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.fixture
def job(tmp_path: Path, few_digits: Path) -> Job:
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    return Job(tmp_path / "run.yaml", tmp_path / "run", PLAIN)


def alone(job: Job, **sets: object) -> subprocess.CompletedProcess[str]:
    """Run in one process, where the number of ranks does not matter."""
    return runs.train(replace(job, sets=job.sets | sets), ranks=1)


def message(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one error message of a run that failed as it should, with exit code 1 from every rank."""
    said = done.stdout
    assert done.returncode == 1, said
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1, said
    return said[said.index("error: ") :]


def test_unknown_key_is_said_once_by_two_ranks(job: Job) -> None:
    """Through DeepSpeed's launcher, which must not add a complaint of its own."""
    done = train(Job(job.config, job.output, PLAIN, {"train.epoch": 3}), ranks=2)
    assert "did you mean train.epochs?" in message(done)


def test_batch_that_does_not_multiply_out(job: Job) -> None:
    ds = PLAIN | {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}
    said = message(runs.train(Job(job.config, job.output, ds), ranks=2))
    assert "train.global_batch is 16" in said
    assert "3 x gradient_accumulation_steps 2 x 2 ranks = 12" in said


def test_missing_and_empty_data(job: Job, tmp_path: Path) -> None:
    assert "there is no folder" in message(alone(job, **{"data.root": tmp_path / "nowhere"}))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    said = message(runs.train(Job(job.config, job.output, PLAIN, {"data.root": str(tmp_path / "empty")}), ranks=2))
    assert "holds no class folders" in said


def test_class_in_val_that_training_does_not_have(job: Job, tmp_path: Path, few_digits: Path) -> None:
    shutil.copytree(few_digits, tmp_path / "data")
    shutil.copytree(few_digits / "val" / "3", tmp_path / "data" / "val" / "eleven")
    assert "eleven" in message(alone(job, **{"data.root": tmp_path / "data"}))


def test_too_many_unreadable_images_are_named(job: Job, tmp_path: Path, few_digits: Path) -> None:
    shutil.copytree(few_digits, tmp_path / "data")
    for victim in (victims := sorted((tmp_path / "data" / "train" / "3").glob("*.jpg"))):
        victim.write_bytes(victim.read_bytes()[:300])
    said = message(alone(job, **{"data.root": tmp_path / "data", "data.max_bad_share": 0.05}))
    assert f"{victims[0].name}: truncated" in said
    assert "8 of 80 images are bad, more than data.max_bad_share 0.05 allows" in said


def test_recipe_that_cannot_be_drawn(job: Job) -> None:
    sets = {"augment.auto_augment": "rand-m9-mstd0.5"}
    assert "timm's default set, inc0, is not supported" in message(
        runs.train(Job(job.config, job.output, PLAIN, sets), 2)
    )
    assert "there is no GPU decoder on the CPU" in message(alone(job, **{"data.hw_decoder_load": 0.5}))
    assert "holds no tar shards" in message(alone(job, **{"data.shuffle_shards": 4}))


def save_teacher(path: Path, num_classes: int) -> Path:
    info = ModelInfo("model", "resnet10t", {}, num_classes, {"mean": [0.5] * 3, "std": [0.5] * 3})
    return save_model_file(path, info, create_model("resnet10t", num_classes=num_classes).state_dict())


def test_teacher_with_other_labels_or_without_weights(job: Job, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", 7)
    assert "knows 7 labels, the data has 10" in message(alone(job, **{"distill.teacher": teacher}))
    assert "distill.teacher_weights" in message(alone(job, **{"distill.teacher": "levit_384"}))


def test_initial_checkpoint_that_does_not_fit(job: Job, tmp_path: Path) -> None:
    wider = create_model(
        "sws_vit", schedule=[2, 2], img_size=32, patch_size=8, embed_dim=64, num_heads=2, num_classes=10
    )
    torch.save({"model": wider.state_dict()}, tmp_path / "wider.pth")
    said = message(alone(job, **{"model.initial_checkpoint": tmp_path / "wider.pth"}))
    assert "pos_embed: (1, 16, 64) in the file, (1, 16, 32) in the model" in said
    (tmp_path / "cut.safetensors").write_bytes(save_teacher(tmp_path / "t.safetensors", 10).read_bytes()[:1000])
    assert "not a whole safetensors file" in message(
        alone(job, **{"model.initial_checkpoint": tmp_path / "cut.safetensors"})
    )


def test_learngene_that_does_not_fit(job: Job, tmp_path: Path) -> None:
    """Another geometry, another depth, or no learngene at all is reported before anything is built."""
    auxiliary = create_model(
        "sws_vit", schedule=[2, 2], img_size=32, patch_size=8, embed_dim=32, num_heads=4, num_classes=10
    )
    info = describe_model(auxiliary, "learngene", preprocessing={"image_size": 32})
    file = save_model_file(tmp_path / "learngene.safetensors", info, auxiliary.state_dict())
    sets = {"model.schedule": None, "model.depth": 3, "model.initial_learngene": str(file)}
    said = message(runs.train(Job(job.config, job.output, PLAIN, sets), ranks=2))
    assert "is of another model: num_heads: 4 there, 2 here" in said
    assert "schedule [2, 2]: a descendant's layers do not repeat" in message(
        alone(job, **{"model.initial_learngene": file})
    )
    more = {"model.depth": 3, "model.schedule": None, "model.plan": [0, 1], "model.initial_learngene": file}
    assert "has 2 layers, but the depth is 3" in message(alone(job, **more))
    teacher = save_teacher(tmp_path / "t.safetensors", 10)
    assert "holds a model, not a learngene" in message(alone(job, **{"model.initial_learngene": teacher}))


def test_reentrant_checkpointing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_REENTRANT_CKPT", "1")  # timm reads it when it is imported
    done = train_alone(replace(job, sets={"model.grad_checkpointing": True}))
    assert "can be silently wrong under ZeRO-3" in message(done)


def test_output_that_cannot_be_written(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = message(
        runs.train(Job(job.config, tmp_path / "elsewhere", PLAIN, {"output": str(tmp_path / "file" / "run")}), ranks=2)
    )
    assert str(tmp_path / "file") in said


# Each step multiplies the weights by a million.
DIVERGING = {"optim.lr": 1000, "optim.lr_batch": None, "optim.weight_decay": 1000}


def test_non_finite_loss_stops_all_ranks(job: Job) -> None:
    sets = DIVERGING | {"optim.warmup_epochs": 0, "train.epochs": 4}
    said = message(runs.train(Job(job.config, job.output, PLAIN, sets), ranks=2))
    assert re.search("the (loss is nan|gradient is not finite) at step", said)


def test_weights_that_are_not_finite_are_not_saved(job: Job) -> None:
    """One step an epoch: the loss before the update is fine, the weights after it are not."""
    sets = DIVERGING | {"train.global_batch": 80, "train.epochs": 12, "train.eval_every": 4}
    said = message(runs.train(Job(job.config, job.output, PLAIN, sets), ranks=2))
    assert re.search("weights are not finite after step|loss is nan at step|gradient is not finite at step", said)
    saved = [load_tensors(path) for path in job.output.glob("checkpoints/step-*/*.safetensors")]
    assert all(tensor.isfinite().all() for weights in saved for tensor in weights.values())


def test_full_disk_while_saving_leaves_the_last_checkpoint(job: Job, tmp_path: Path) -> None:
    """A file system that holds the first checkpoints but not all that keep_last asks for."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        job = Job(job.config, disk / "run", PLAIN, {"checkpoint.keep_last": 100}, resume="auto")
        job.ds_file()
        said = message(runs.train(job, ranks=2))
        assert "MiB are free" in said
        saved = sorted(disk.glob("run/checkpoints/step-*/state.json"))
        assert saved, "not even one checkpoint fitted: the test's disk is too small"
        last = int(saved[-1].parent.name.removeprefix("step-"))
        assert max(entry["step"] for entry in log(disk / "run")) > last
        # With room again, the run goes on from that checkpoint.
        for old in saved[:-1]:
            shutil.rmtree(old.parent)
        again = runs.train(Job(job.config, job.output, PLAIN, {"train.max_steps": last + 1}, resume="auto"), ranks=2)
        assert f"from step {last}" in again.stdout, again.stdout
    finally:
        subprocess.run(["umount", disk], check=True)


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_write_error_in_the_middle_leaves_the_last_checkpoint(job: Job, tmp_path: Path) -> None:
    """A file-size limit stops the writer half-way, where no check beforehand can see it coming."""
    good = alone(job, **{"train.max_steps": 5})
    assert good.returncode == 0, good.stdout
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED)
    done = ranks.script(limited, *train_arguments(replace(job, resume="auto")))
    assert "the last checkpoint is whole" in message(done)
    assert [path.name for path in job.output.glob("checkpoints/step-*")] == ["step-00000005"]
    again = runs.train(Job(job.config, job.output, PLAIN, {"train.max_steps": 10}, resume="auto"), ranks=1)
    assert "from step 5" in again.stdout, again.stdout


def test_a_port_that_another_program_has(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        assert message(train_alone(job)).startswith(
            f"error: port {port} of {socket.gethostname()}, where the ranks are"
        )
