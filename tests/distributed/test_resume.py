"""Stopped and resumed equals never stopped, bit for bit; checkpoints are whole or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sws_dist.checkpoint.checkpoint import prune_checkpoints, verify
from sws_dist.checkpoint.folders import delete_checkpoint, list_checkpoints
from sws_dist.data import manifest, sampler
from tests import ranks, runs
from tests.launching import Job, losses

STAGES = (0, 1, 2, 3)
RUN = """
output: unused
model:
  name: sws_vit
  schedule: [2, 2]
  elastic: {min_depth: 2, max_depth: 5}
  drop_path: 0.2
  kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {re_prob: 0.5, mixup: 0.8, num_repeats: 3}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 2, global_batch: 16, log_every: 1, eval_every: 1}
checkpoint: {keep_last: 2}
"""


def ds(stage: int) -> dict[str, object]:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    """For every stage a run of 10 steps, and one that is stopped after 4 and after 7."""
    folder = tmp_path_factory.mktemp("resume")
    file = folder / "run.yaml"
    file.write_text(RUN.replace("ROOT", str(few_digits)))
    jobs = []
    for stage in STAGES:
        jobs.append(Job(file, folder / f"whole{stage}", ds(stage)))
        for steps in (4, 7):
            jobs.append(Job(file, folder / f"parts{stage}", ds(stage), {"train.max_steps": steps}, resume="auto"))
        jobs.append(Job(file, folder / f"parts{stage}", ds(stage), resume="auto"))
    runs.train_all(jobs, 2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["learngene", "learngene_ema"])
def test_weights_are_those_of_the_undisturbed_run(folder: Path, stage: int, name: str) -> None:
    whole = load_file(folder / f"whole{stage}" / f"{name}.safetensors")
    parts = load_file(folder / f"parts{stage}" / f"{name}.safetensors")
    different = [key for key in whole if not torch.equal(whole[key], parts[key])]
    assert not different


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_taken_once(folder: Path, stage: int) -> None:
    assert losses(folder / f"parts{stage}") == losses(folder / f"whole{stage}")
    history = [
        json.loads((folder / f"{run}{stage}" / "metrics.json").read_text())["history"] for run in ("whole", "parts")
    ]
    assert [point["val/top1"] for point in history[0]] == [point["val/top1"] for point in history[1]]


def test_old_checkpoints_are_pruned(folder: Path) -> None:
    kept = sorted(path.name for path in (folder / "parts2" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000007", "step-00000010"]


def refused(job: Job, ranks: int = 1) -> str:
    """Start a run that has to end at once; its one message."""
    done = runs.train(job, ranks=ranks)
    assert done.returncode != 0
    messages = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stdout[-4000:]
    assert "Traceback" not in done.stdout
    return messages[0]


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "parts2", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    return tmp_path / "run"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip_a_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"])
def test_damage_is_noticed(damaged: Path, harm: Callable[[Path], None], name: str) -> None:
    newest = damaged / "checkpoints" / "step-00000010"
    assert verify(newest) is None
    harm(newest / name)
    found = verify(newest)
    assert found is not None
    assert f"{newest}: damaged: {name}" in found


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 2}', '{"version": 1}'])
def test_a_description_that_is_none(damaged: Path, content: str) -> None:
    newest = damaged / "checkpoints" / "step-00000010"
    (newest / "state.json").write_text(content)
    assert str(newest) in str(verify(newest))


def test_what_a_kill_amid_pruning_leaves_is_pruned_later(damaged: Path) -> None:
    """Pruning hides a checkpoint, and deletes it file by file; a folder of the user's that is hidden too stays."""
    checkpoints = damaged / "checkpoints"
    for number, file in (("3", "state.json"), ("4", "shard-00000-of-00002.safetensors")):
        half_deleted = shutil.copytree(checkpoints / "step-00000007", checkpoints / f".step-0000000{number}")
        (half_deleted / file).unlink()
    shutil.copytree(half_deleted, checkpoints / ".step-00000005")
    (checkpoints / ".step-00000005" / "notes.txt").touch()
    shutil.copytree(half_deleted, checkpoints / ".abandoned-step-00000006")
    prune_checkpoints(checkpoints, keep_last=2, keep_best=False)
    kept = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert kept == [".step-00000005", "step-00000007", "step-00000010"]


def kill_amid_deleting(checkpoint: Path) -> None:
    """Delete a checkpoint, and die when the first of its files is gone."""
    unlink = Path.unlink

    def unlink_and_die(path: Path) -> None:
        unlink(path)
        os._exit(9)

    Path.unlink = unlink_and_die  # type: ignore[assignment, method-assign]
    delete_checkpoint(checkpoint)


@pytest.mark.parametrize("with_notes", [False, True])
def test_a_deletion_that_a_kill_cut_short_is_ended_later(damaged: Path, with_notes: bool) -> None:
    """Only a folder with files of the user's is there as long as it is damaged."""
    checkpoints = damaged / "checkpoints"
    if with_notes:
        (checkpoints / "step-00000007" / "notes.txt").touch()
    (ended,), _ = ranks.outcomes(kill_amid_deleting, checkpoints / "step-00000007", world=1)
    assert ended.exitcode == 9
    assert [verify(found) is None for found in list_checkpoints(checkpoints)] == [False, True][not with_notes :]
    prune_checkpoints(checkpoints, keep_last=1, keep_best=False)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000010"]
    left = ["step-00000007/notes.txt"] if with_notes else []
    assert [str(file.relative_to(checkpoints)) for file in checkpoints.glob("*7/*")] == left


@pytest.mark.parametrize("content", [None, "{"])
def test_weights_without_a_description_are_damaged_and_never_deleted(
    folder: Path, damaged: Path, content: str | None
) -> None:
    checkpoints = damaged / "checkpoints"
    before = sorted(checkpoints.rglob("shard-*"))
    for state in checkpoints.glob("step-*/state.json"):
        if content is None:
            state.unlink()
        else:
            state.write_text(content)
    prune_checkpoints(checkpoints, keep_last=1, keep_best=True)
    assert sorted(checkpoints.rglob("shard-*")) == before
    message = refused(Job(folder / "run.yaml", damaged, ds(2), resume="auto"), ranks=2)
    assert "every checkpoint is damaged" in message
    assert sorted(checkpoints.rglob("shard-*")) == before


def test_auto_skips_a_checkpoint_without_a_description(folder: Path, damaged: Path) -> None:
    (damaged / "checkpoints" / "step-00000010" / "state.json").unlink()
    done = runs.train(Job(folder / "run.yaml", damaged, ds(2), resume="auto"), ranks=2)
    assert done.returncode == 0, done.stdout
    assert "(state.json: No such file or directory); going on from step-00000007" in done.stdout
    assert "set aside as abandoned-step-00000010" in done.stdout


def test_auto_skips_a_checkpoint_that_one_rank_cannot_read(folder: Path, damaged: Path) -> None:
    """Its shard fails with EIO, as a bad block does: /proc/self/mem is a file of 0 bytes that cannot be read."""
    newest, shard = damaged / "checkpoints" / "step-00000010", "shard-00001-of-00002.safetensors"
    (newest / shard).unlink()
    (newest / shard).symlink_to("/proc/self/mem")
    state = json.loads((newest / "state.json").read_text())
    state["files"][shard]["bytes"] = 0
    (newest / "state.json").write_text(json.dumps(state))
    done = runs.train(Job(folder / "run.yaml", damaged, ds(2), resume="auto"), ranks=2)
    assert done.returncode == 0, done.stdout
    assert f"{shard} cannot be read (Input/output error); going on from step-00000007" in done.stdout


def test_pruning_passes_over_damaged_descriptions_and_leaves_other_folders_alone(damaged: Path) -> None:
    checkpoints = damaged / "checkpoints"
    (checkpoints / "step-00000007" / "state.json").write_text("{")
    for own in ("step-of-mine", "notes", "step-00001000"):
        (checkpoints / own).mkdir()
        (checkpoints / own / "weights.pt").touch()
    prune_checkpoints(checkpoints, keep_last=1, keep_best=True)
    kept = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert kept == ["notes", "step-00000007", "step-00000010", "step-00001000", "step-of-mine"]


def test_auto_skips_a_damaged_checkpoint(folder: Path, damaged: Path) -> None:
    newest = damaged / "checkpoints" / "step-00000010"
    flip_a_byte(newest / "shard-00001-of-00002.safetensors")
    job = Job(folder / "run.yaml", damaged, ds(2))
    assert "its checksum differs" in refused(replace(job, resume=str(newest)), ranks=2)
    done = runs.train(replace(job, resume="auto"), ranks=2)
    assert done.returncode == 0, done.stdout
    assert "its checksum differs); going on from step-00000007" in done.stdout
    assert "set aside as abandoned-step-00000010" in done.stdout
    whole, mended = (load_file(path / "learngene.safetensors") for path in (folder / "whole2", damaged))
    assert all(torch.equal(whole[key], mended[key]) for key in whole)


def test_nothing_is_begun_anew_where_all_are_damaged(folder: Path, damaged: Path) -> None:
    for file in damaged.glob("checkpoints/step-*/shard-00000*"):
        cut(file)
    message = refused(Job(folder / "run.yaml", damaged, ds(2), resume="auto"), ranks=2)
    assert "every checkpoint is damaged" in message


def test_another_stream_of_images_is_refused(folder: Path, damaged: Path) -> None:
    for key, value in (("train.global_batch", 8), ("train.seed", 1), ("train.epochs", 3)):
        message = refused(Job(folder / "run.yaml", damaged, ds(2), {key: value}, resume="auto"), ranks=2)
        assert "a run goes on only as it began" in message, key


def test_going_back_sets_later_checkpoints_aside(folder: Path, damaged: Path) -> None:
    back = str(damaged / "checkpoints" / "step-00000007")
    done = runs.train(Job(folder / "run.yaml", damaged, ds(2), {"train.max_steps": 8}, resume=back), ranks=2)
    assert done.returncode == 0, done.stdout
    assert "set aside as abandoned-step-00000010" in done.stdout
    kept = sorted(path.name for path in (damaged / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["abandoned-step-00000010", "step-00000007", "step-00000008"]


def test_a_file_that_vanished_meanwhile_changes_no_other_step(folder: Path, tmp_path: Path, few_digits: Path) -> None:
    """The run goes on with its own list: only the step that would have seen the file again differs."""
    root = tmp_path / "data"
    shutil.copytree(few_digits, root)
    images = manifest.scan(root, "train")
    order = sampler.TrainOrder(len(images), seed=0, num_repeats=3)
    steps = [set(order.images(sampler.micro_batch_positions(step, 16, 0, 1)).tolist()) for step in range(10)]
    only_at_the_end = (steps[9] - set().union(*steps[4:9])).pop()
    job = Job(folder / "run.yaml", tmp_path / "run", ds(2), {"data.root": str(root), "train.max_steps": 4})
    assert runs.train(job, ranks=2).returncode == 0
    images.file(only_at_the_end).unlink()
    done = runs.train(Job(job.config, job.output, job.ds, {"data.root": str(root)}, resume="auto"), ranks=2)
    assert done.returncode == 0, done.stdout
    assert "missing" in done.stdout
    whole, parts = losses(folder / "whole2"), losses(tmp_path / "run")
    assert parts[:9] == whole[:9]
    assert parts[9] != whole[9]


def test_a_folder_that_holds_a_run_is_not_overwritten(folder: Path, damaged: Path) -> None:
    before = sorted(path.name for path in damaged.rglob("*"))
    assert "--resume auto" in refused(Job(folder / "run.yaml", damaged, ds(2)), ranks=2)
    assert sorted(path.name for path in damaged.rglob("*")) == before


def test_a_finished_run_does_not_start_again(folder: Path) -> None:
    done = runs.train(Job(folder / "run.yaml", folder / "whole2", ds(2), resume="auto"), ranks=2)
    assert done.returncode == 0
    assert "this run is done" in done.stdout
