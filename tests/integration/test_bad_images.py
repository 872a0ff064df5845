"""Whole runs on folders with bad files, bad from the start or turning bad while the run reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import runs
from tests.launching import Job, log
from tests.unit import bad_files

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {auto_augment: rand-m9-mstd0.5-inc1}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 3, global_batch: 20, log_every: 1, eval_every: 3}
"""
PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.fixture
def data(digits_root: Path, tmp_path: Path) -> Path:
    """180 training and 20 validation digits."""
    for split, count in (("train", 18), ("val", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for file in sorted((digits_root / split / str(label)).glob("*.jpg"))[:count]:
                shutil.copy(file, folder)
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(tmp_path / "data")))
    return tmp_path / "data"


def counted(output: Path) -> list[float]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("perf/bad_images")]


def training_files(data: Path) -> list[Path]:
    return sorted((data / "train").glob("*/*.jpg"))


def test_five_percent_of_nine_kinds(data: Path, tmp_path: Path) -> None:
    files = training_files(data)
    reasons = bad_files.spoil(files[4::20])
    assert len(reasons) == 9 == 0.05 * len(files)
    job = Job(tmp_path / "run.yaml", tmp_path / "run", PLAIN)
    done = runs.train(job, ranks=2)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (job.output / "metrics.json").is_file()
    assert "171 training and 20 validation images" in done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("warning: bad image: ")]
    assert len(said) == 9
    for name, reason in reasons.items():
        assert sum(name in line and reason in line for line in said) == 1, (name, reason, said)
    assert counted(job.output) == [9] * (3 * 171 // 20)


def test_files_that_turn_bad_while_training(data: Path, tmp_path: Path) -> None:
    """Vanished, emptied, cut and the rest, once the run is under way: it goes on, and counts and names them."""
    files = training_files(data)
    job = Job(tmp_path / "run.yaml", tmp_path / "run", PLAIN, {"train.epochs": 6, "train.eval_every": 6})
    with runs.running(job, ranks=1) as run:
        run.wait_for_step(10)
        (process,) = run.ranks()
        process.suspend()  # so that an epoch at least remains
        before = log(job.output)[-1]["step"]
        reasons = bad_files.spoil(files[4::20])
        process.resume()
        assert run.wait() == [0], run.said()[-4000:]
        printed = run.said()
    assert before < 6 * 9 - 2 * 9 - 3, "the run was over too soon for this test to mean anything"
    assert len(log(job.output)) >= 6 * 9
    said = [line for line in printed.splitlines() if line.startswith("warning: bad image: ")]
    assert len(said) == 9
    for name, reason in reasons.items():
        assert sum(name in line and reason in line for line in said) == 1, (name, reason, said)
    counts = counted(job.output)
    assert counts[0] == 0
    assert counts[-1] == 9


def test_beyond_the_allowed_share_all_ranks_stop(data: Path, tmp_path: Path) -> None:
    bad_files.spoil(training_files(data)[4::20])
    job = Job(tmp_path / "run.yaml", tmp_path / "run", PLAIN, {"data.max_bad_share": 0.04})
    done = runs.train(job, ranks=2)
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1, done.stdout[-4000:]
    assert "9 of 180 images are bad, more than data.max_bad_share 0.04 allows" in done.stdout


def test_a_data_disk_that_goes_away_ends_all_ranks(data: Path, tmp_path: Path) -> None:
    """Two ranks whose images vanish under way: one message, no rank that waits for ever."""
    job = Job(tmp_path / "run.yaml", tmp_path / "run", PLAIN, {"train.epochs": 500})
    with runs.running(job, ranks=2) as run:
        run.wait_for_step(5)
        shutil.rmtree(data)
        assert run.wait() == [1, 1], run.said()[-4000:]
        said = run.said()
    assert "Traceback" not in said, said[-4000:]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said[-4000:]
    assert "is the data still there?" in errors[0] or "more than data.max_bad_share" in errors[0]
