"""The study from its data to its report: real runs of a tiny one, and one that was interrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launching import REPOSITORY


def run_study(output: Path, data: Path) -> str:
    command = [sys.executable, "launcher/study.py", "--size", "tiny", "--output", str(output), "--data", str(data)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_tiny_study(tmp_path: Path, few_digits: Path) -> None:
    """It takes digits for clothes: the images are where the converter would have put them."""
    shutil.copytree(few_digits, tmp_path / "data" / "fashion-mnist-1000")
    run_study(tmp_path / "out", tmp_path / "data")
    report = (tmp_path / "out" / "study.md").read_text()
    assert report.startswith("# Fashion-MNIST, 1,000 training images\n")
    for row in (
        *("| top-1 at depth | 5 | 6 | 10 | 15 |", "| untuned |", "| untuned, from an auxiliary model of one depth |"),
        "| untuned, from an auxiliary model of one depth, branches scaled |",
        "| untuned, from an auxiliary model without the teacher |",
        *("| fine-tuned, 5 epochs |", "| random weights, fine-tuned the same way, 5 epochs |"),
        *("| random weights, 2 epochs |", "| random weights, with the teacher, 2 epochs |"),
    ):
        assert row in report, row
    assert (tmp_path / "out" / "study.png").is_file()

    other = [sys.executable, "launcher/study.py", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    (tmp_path / "data" / "fashion-mnist-6000" / "train").mkdir(parents=True)
    refused = subprocess.run(other, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert "seed0/teacher/metrics.json exists: this run is done" in refused.stderr
    assert "train.epochs 12 (it was 3)" in refused.stderr

    # One run is lost: it alone is made again, and the table is the same.
    shutil.rmtree(tmp_path / "out" / "seed0" / "depth6" / "scratch_full")
    assert run_study(tmp_path / "out", tmp_path / "data").count("launcher/train.py") == 1
    again = (tmp_path / "out" / "study.md").read_text()
    assert again[: again.index("| run |")] == report[: report.index("| run |")]
