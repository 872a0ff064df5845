"""The quickstart's report says what the runs' metrics say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[2]


def write(run: Path, tops: dict[int, float], **more: Any) -> None:
    """A run's metrics.json with these validation scores by epoch."""
    history = [{"epoch": epoch, "val/top1": top1} for epoch, top1 in tops.items()]
    fields = {"model": "m", "depth": 4, "parameters": 2_000_000, "validation_images": 400, "commit": "abc", "seed": 0}
    fields |= {"hardware": "a CPU", "versions": {"torch": "2"}, "rank_seconds": 10.0, "flops": 10**15}
    run.mkdir(parents=True)
    metrics = fields | {"epochs": max(tops), "top1": tops[max(tops)], "history": history} | more
    (run / "metrics.json").write_text(json.dumps(metrics))


def seed(folder: Path, number: int, tuned: float) -> Path:
    write(folder / "teacher", {2: 0.99}, rank_seconds=5.0)
    write(folder / "auxiliary", {6: 0.98}, seed=number, parameters=500_000)
    for depth, full in ((3, 0.95), (4, 0.97)):
        write(folder / f"depth{depth}" / "tuned", {0: 0.8, 1: 0.9, 2: tuned}, flops=10**14)
        write(folder / f"depth{depth}" / "scratch", {0: 0.1, 1: 0.2, 2: 0.3})
        write(folder / f"depth{depth}" / "scratch_full", {6: full}, flops=3 * 10**15, rank_seconds=10.0 + number)
    return folder


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_numbers_of_two_seeds(tmp_path: Path) -> None:
    folders = [seed(tmp_path / "a", 0, tuned=0.94), seed(tmp_path / "b", 7, tuned=0.96)]
    done = report("--runs", *folders, "--out", tmp_path / "out.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    assert "from seeds 0, 7" in text
    assert "| 3 | 2.00 M | 80.0 | 90.0 | 95.0 (94.0-96.0) | 20.0 | 30.0 | 95.0 |" in text
    # at least as good as the twin: 0.96 against 0.95 alone
    assert "1 of 4 descendants are at least as good" in text
    assert "After 2 epochs it has 95.0 %; from scratch, 6 epochs lead to 96.0 %" in text
    # auxiliary + two tunings: 10 + 2 * 10 rank-seconds, 1 + 2 * 0.1 PFLOP; from scratch 2 * 3 PFLOP, 4 M parameters
    assert "| by learngene | 30 | 1.200 | 0.50 M | 5.0 | 8.0 |" in text
    assert "| from scratch, full budget | 20 | 6.000 | 4.00 M | 1.0 | 1.0 |" in text
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 500


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    folder = seed(tmp_path / "a", 0, tuned=0.9)
    (folder / "depth4" / "scratch" / "metrics.json").unlink()
    done = report("--runs", folder)
    assert done.returncode == 1
    assert "depth4/scratch/metrics.json: not there; this run has not finished" in done.stderr
