"""What may be different when a run is resumed: its config, its data's place, what else lies in its folder."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sws_dist.atomic import atomic_write_json
from sws_dist.checkpoint.folders import list_checkpoints
from tests import runs
from tests.launching import Job, losses
from tests.launching import log as read_log

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 1], kwargs: {patch_size: 8, embed_dim: 16, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null}
train: {epochs: 2, global_batch: 16, log_every: 1, eval_every: 1}
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Job:
    """A run of 10 steps that was stopped after 6; its data is its own."""
    folder = tmp_path_factory.mktemp("changes")
    shutil.copytree(few_digits, folder / "data")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(folder / "data")))
    job = Job(folder / "run.yaml", folder / "run", {"zero_optimization": {"stage": 1}}, {"train.max_steps": 6})
    assert runs.train(job, ranks=1).returncode == 0
    return replace(job, sets={}, resume="auto")


@pytest.fixture
def job(stopped: Job, tmp_path: Path) -> Job:
    """A copy of the stopped run, to go on."""
    shutil.copytree(stopped.output, tmp_path / "run")
    return replace(stopped, output=tmp_path / "run")


def go_on(job: Job) -> str:
    done = runs.train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def refused(job: Job) -> str:
    """Start a run that has to end at once; its one message."""
    done = runs.train(job, ranks=1)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    return message


def test_a_key_that_is_part_of_the_recipe_may_not_change(job: Job) -> None:
    message = refused(replace(job, sets={"optim.lr": 1e-3, "augment.mixup": 0.8, "data.num_threads": 2}))
    assert "a run goes on only as it began, and this config has augment.mixup 0.8 (it was 0.0), " in message
    assert "optim.lr 0.001 (it was 0.003). Set that back" in message
    assert "num_threads" not in message
    assert "gradient_clipping 1.0 in the DeepSpeed config (it was 0.0)" in refused(
        replace(job, ds=job.ds | {"gradient_clipping": 1.0})
    )


def test_keys_that_may_change_are_said(job: Job) -> None:
    said = go_on(replace(job, sets={"data.num_threads": 2, "train.log_every": 2}))
    assert f"going on with output {json.dumps(str(job.output))} (it was " in said
    assert "), data.num_threads 2 (it was 1), train.max_steps null (it was 6), train.log_every 2 (it was 1)\n" in said
    assert "num_threads: 2" in (job.output / "config.yaml").read_text()


def test_a_finished_run_says_so_and_how_to_go_on(job: Job) -> None:
    go_on(job)
    assert "this run is done" in go_on(replace(job, sets={"data.num_threads": 2}))
    message = refused(replace(job, sets={"train.epochs": 4}))
    assert f"{job.output / 'metrics.json'} exists: this run is done. " in message
    assert "train.epochs 4 (it was 2)" in message
    weights = job.output / "learngene.safetensors"
    assert message.endswith(f"--set model.initial_checkpoint={weights} --set output=ANOTHER")
    anew = {"train.epochs": 1, "model.initial_checkpoint": str(weights)}
    go_on(replace(job, output=job.output.with_name("anew"), sets=anew))  # as the message says


def test_data_that_moved_is_read_from_its_new_place(job: Job, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(job.config.parent / "data", old)
    began = replace(job, output=tmp_path / "moved", resume=None, sets={"data.root": str(old), "train.max_steps": 6})
    go_on(began)
    new = old.rename(tmp_path / "new")
    moved = replace(began, resume="auto", sets={"data.root": str(new)})
    said = go_on(moved)
    assert f"data.root {json.dumps(str(new))} (it was {json.dumps(str(old))})" in said
    assert "missing" not in said
    go_on(job)
    assert losses(moved.output) == losses(job.output)


def drop(train: Path) -> str:
    next(train.rglob("*.jpg")).unlink()
    return "images instead of"


def rename(train: Path) -> str:
    file = min(train.rglob("*.jpg"))
    file.rename(file.with_name("0000-other.jpg"))
    return f"{file.parent.name}/0000-other.jpg instead of {file.parent.name}/{file.name}"


def swap_classes(train: Path) -> str:
    (train / "9").rename(train / "nine")
    return "other classes"


@pytest.mark.parametrize("change", [drop, rename, swap_classes])
def test_another_data_set_is_refused(job: Job, tmp_path: Path, change: Callable[[Path], str]) -> None:
    shutil.copytree(job.config.parent / "data", tmp_path / "data")
    difference = change(tmp_path / "data" / "train")
    if change is swap_classes:
        change(tmp_path / "data" / "val")
    message = refused(replace(job, sets={"data.root": str(tmp_path / "data")}))
    assert f"{tmp_path / 'data' / 'train'}: not the images that this run began with, from " in message
    assert str(job.config.parent / "data" / "train") in message
    assert difference in message


def test_what_a_user_puts_among_the_checkpoints_stays(job: Job) -> None:
    """Copies, notes, folders and files that are named like ours; none of them is gone on from."""
    folder = job.output / "checkpoints"
    (newest,) = list_checkpoints(folder)[-1:]
    shutil.copytree(newest, folder / "step-00000099")  # would be the newest
    shutil.copytree(newest, folder / "best so far")
    (newest / "notes.txt").write_text("mine")
    (folder / "step-00000008").write_text("mine")
    for name in ("step-00000098", ".step-00000097"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("{}")
        (folder / name / "weights.pt").write_text("mine")
    mine = {path for path in folder.rglob("*") if newest not in path.parents and path.is_file()}
    mine -= set(folder.glob("step-0000000[0-7]/*"))
    assert "from step 6, " in go_on(replace(job, sets={"checkpoint.keep_last": 1, "checkpoint.keep_best": False}))
    assert all(path.is_file() for path in mine)
    assert [path.name for path in newest.iterdir()] == ["notes.txt"]
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000010"]


def test_the_log_holds_each_step_once(job: Job) -> None:
    """After a kill beyond the last checkpoint, in the middle of a line."""
    file = job.output / "log.jsonl"
    whole = file.read_text()
    later = whole.splitlines()[-1].replace('"step": 6', '"step": 7')
    file.write_text(whole + later + "\n" + later[:40])
    go_on(job)
    assert file.read_text().startswith(whole)
    assert [int(entry["step"]) for entry in read_log(job.output) if "train/loss" in entry] == list(range(1, 11))
    assert [int(entry["step"]) for entry in read_log(job.output) if "val/top1" in entry] == [5, 10]
    events = EventAccumulator(str(job.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def test_intervals_hold_for_a_batch_larger_than_an_epoch(job: Job) -> None:
    """80 images and batches of 200: 2, 5, 7 and 10 epochs are complete after the four steps."""
    sets = {"train.epochs": 10, "train.global_batch": 200, "train.eval_every": 3, "checkpoint.every": 5}
    anew = replace(job, output=job.output.with_name("anew"), resume=None, sets=sets | {"checkpoint.keep_last": 9})
    go_on(anew)
    metrics = json.loads((anew.output / "metrics.json").read_text())
    assert [(point["epoch"], point["step"]) for point in metrics["history"]] == [(5, 2), (7, 3), (10, 4)]
    saved = [path.name for path in list_checkpoints(anew.output / "checkpoints")]
    assert saved == ["step-00000002", "step-00000004"]


def test_a_checkpoint_of_another_run_does_not_go_on_among_this_ones(job: Job, stopped: Job) -> None:
    checkpoint = list_checkpoints(stopped.output / "checkpoints")[0]
    before = sorted(job.output.glob("checkpoints/*"))
    assert f"output {job.output}: already holds a run" in refused(replace(job, resume=str(checkpoint)))
    assert sorted(job.output.glob("checkpoints/*")) == before


def test_a_second_run_is_refused_while_the_first_one_works(job: Job) -> None:
    """The first one's ranks are on another host: only that their heartbeats go on says that they are alive."""
    (job.output / "heartbeats").mkdir(exist_ok=True)
    file, begun, done = job.output / "heartbeats" / "rank-00003.json", threading.Event(), threading.Event()

    def beat() -> None:
        for number in itertools.count():
            last = {"rank": 3, "host": "node7", "pid": 1234, "step": 5, "doing": "saving", "beat": number, "time": ""}
            atomic_write_json(file, last)
            begun.set()
            if done.wait(0.5):
                break

    thread = threading.Thread(target=beat)
    thread.start()
    begun.wait()
    try:
        assert "another run is at work there: rank 3 on node7 (process 1234)" in refused(job)
    finally:
        done.set()
        thread.join()
    assert "from step 6" in go_on(job)  # its heartbeats have stopped
