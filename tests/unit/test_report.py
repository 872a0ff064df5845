"""The report says what the runs' metrics say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def write(run: Path, tops: dict[int, float], **more: Any) -> None:
    """Write a run's metrics.json with these validation scores by epoch."""
    history = [{"epoch": epoch, "val/top1": top1} for epoch, top1 in tops.items()]
    fields = {"model": "m", "depth": 4, "parameters": 2_000_000, "validation_images": 400, "commit": "abc", "seed": 0}
    fields |= {"hardware": "a CPU", "versions": {"torch": "2"}, "rank_seconds": 10.0, "flops": 10**15, "images": 10**6}
    fields |= {"flops_forward": 4 * 10**8, "flops_teacher": 0}
    run.mkdir(parents=True)
    metrics = fields | {"epochs": max(tops), "top1": tops[max(tops)], "history": history} | more
    (run / "metrics.json").write_text(json.dumps(metrics))


def family(folder: Path, seed: int, tuned: float, *, others: bool = False) -> Path:
    """Write a family: two stages, scored at 3, 4 and 5 layers, of which 3 and 4 were trained too."""
    write(folder / "teacher", {2: 0.99}, rank_seconds=5.0, flops=2 * 10**14)
    for name, near in (("auxiliary", 0.9), ("fixed", 0.5), ("unshared", 0.6)):
        if name == "auxiliary" or others:
            write(folder / name, {6: 0.98}, seed=seed, parameters=500_000, flops=10**15)
            path = folder / name / "metrics.json"
            metrics = json.loads(path.read_text())
            metrics["history"][-1] |= {"val_depth3/top1": near, "val_depth5/top1": near, "val_depth3/loss": 1.0}
            path.write_text(json.dumps(metrics))
            (folder / name / "config.yaml").write_text(
                "output: o\ndata: {root: r}\nmodel: {name: sws_vit, schedule: [2, 2]}\ndistill: {teacher: t}\n"
            )
    if others:
        scaled = {"depths": {"3": {"top1": 0.7}, "5": {"top1": 0.8}}}
        (folder / "fixed" / "scaled.json").write_text(json.dumps(scaled))
    for depth, full in ((3, 0.95), (4, 0.97)):
        of = {"depth": depth, "flops_forward": depth * 10**8, "parameters": 500_000 + (depth - 2) * 100_000}
        write(folder / f"depth{depth}" / "tuned", {0: 0.8, 1: 0.9, 2: tuned}, **of, images=10**5)
        write(folder / f"depth{depth}" / "scratch_full", {6: full}, **of)
    return folder


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_numbers_of_two_seeds(tmp_path: Path) -> None:
    folders = [family(tmp_path / "a", 0, tuned=0.94, others=True), family(tmp_path / "b", 7, tuned=0.96, others=True)]
    done = report("--runs", *folders, "--out", tmp_path / "out.md", "--title", "Two seeds")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# Two seeds\n")
    assert "from seeds 0, 7" in text
    table = [
        "| top-1 at depth | 3 | 4 | 5 |",
        "| untuned | 90.0 | 98.0 | 90.0 |",
        "| untuned, from an auxiliary model of one depth | 50.0 | 98.0 | 50.0 |",
        "| untuned, from an auxiliary model of one depth, branches scaled | 70.0 | 98.0 | 80.0 |",
        "| untuned, layers picked from a model without sharing | 60.0 | 98.0 | 60.0 |",
        "| fine-tuned, 1 epoch | 90.0 | 90.0 |  |",
        "| fine-tuned, 2 epochs | 95.0 (94.0-96.0) | 95.0 (94.0-96.0) |  |",
        "| random weights, 6 epochs | 95.0 | 97.0 |  |",
    ]
    for row in table:
        assert row in text
    # 90 and 98 against 95 and 97
    assert "random weights, 6 epochs: 94.0 % against 96.0 % (-2.0 points)" in text
    # teacher and auxiliary: 0.2 + 1 PFLOP; each depth's tuning 3 * 0.1 M images * depth * 0.1 GFLOP = 0.03 depth PFLOP
    assert "| learngene, untuned | 1.2 | 3.0 x as much |" in text
    assert "| learngene, each fine-tuned | 1.56 | 2.3 x as much |" in text
    assert "the untuned learngene costs 1 PFLOP; random weights, 6 epochs 3.6 x as much." in text
    assert "| random weights, 6 epochs | 3.6 | 1.0 x as much |" in text  # 3 * 1 M images * (3 + 4 + 5) * 0.1 GFLOP
    assert "0.50 M parameters, descendants of these depths 2.10 M: 4.2 times" in text  # 0.6 + 0.7 + 0.8
    assert "All runs: commit abc; a CPU a rank; torch 2." in text
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 500


def test_one_family_without_rivals_of_its_own(tmp_path: Path) -> None:
    done = report("--runs", family(tmp_path / "a", 3, tuned=0.9))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "a" / "report.md").read_text()
    assert "from seed 3." in text
    assert "auxiliary model of one depth" not in text


def test_nothing_is_compared_where_untuned_scores_are_of_other_depths(tmp_path: Path) -> None:
    folder = family(tmp_path / "a", 0, tuned=0.94)
    shutil.rmtree(folder / "depth4")
    shutil.move(folder / "depth3", folder / "depth6")
    assert report("--runs", folder).returncode == 0
    assert "Untuned descendants, at" not in (folder / "report.md").read_text()


def test_runs_of_other_commits_are_named(tmp_path: Path) -> None:
    folder = family(tmp_path / "a", 3, tuned=0.9)
    path = folder / "auxiliary" / "metrics.json"
    path.write_text(path.read_text().replace('"abc"', '"def"'))
    text = report("--runs", folder).stdout
    assert "- All others: commit abc; a CPU a rank; torch 2." in text
    assert "- auxiliary model (seed 3): commit def; a CPU a rank; torch 2." in text


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    folder = family(tmp_path / "a", 0, tuned=0.9)
    (folder / "depth4" / "scratch_full" / "metrics.json").unlink()
    done = report("--runs", folder)
    assert done.returncode == 1
    assert "depth4/scratch_full/metrics.json: not there; this run has not finished" in done.stderr


def test_the_first_familys_teacher_taught_the_others(tmp_path: Path) -> None:
    """As in a study of several seeds. A family that another teacher taught has to have it."""
    folders = [family(tmp_path / "a", 0, tuned=0.94), family(tmp_path / "b", 7, tuned=0.96)]
    shutil.rmtree(folders[1] / "teacher")
    done = report("--runs", *folders)
    assert done.returncode == 0, done.stderr
    assert "- Teacher: m, 99.0 %." in done.stdout
    config = folders[1] / "auxiliary" / "config.yaml"
    config.write_text(config.read_text().replace("teacher: t", "teacher: another"))
    done = report("--runs", *folders)
    assert done.returncode == 1
    assert "b/teacher/metrics.json: not there" in done.stderr


@pytest.mark.parametrize("missing", ["depth3", "depth4"])
def test_seeds_must_have_the_same_runs(tmp_path: Path, missing: str) -> None:
    folders = [family(tmp_path / "a", 0, tuned=0.94), family(tmp_path / "b", 7, tuned=0.96)]
    shutil.rmtree(folders[1] / missing)
    done = report("--runs", *folders)
    assert done.returncode == 1
    assert "has not the same runs as" in done.stderr


def test_without_random_weights_nothing_is_compared_with_them(tmp_path: Path) -> None:
    """As in a study of some runs alone: the table stays, and what random weights would be needed for goes."""
    folder = family(tmp_path / "a", 0, tuned=0.9, others=True)
    for depth in (3, 4):
        shutil.rmtree(folder / f"depth{depth}")
    done = report("--runs", folder)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.md").read_text()
    assert "| untuned, from an auxiliary model of one depth, branches scaled | 70.0 | 98.0 | 80.0 |" in text
    assert "| auxiliary model of one depth | 6 | 1,000,000 | 1 | 10 |" in text
    assert "random weights" not in text
    assert (folder / "report.png").is_file()


def test_there_must_be_something_to_compare_with(tmp_path: Path) -> None:
    folder = family(tmp_path / "a", 0, tuned=0.9)
    for depth in (3, 4):
        shutil.rmtree(folder / f"depth{depth}")
    done = report("--runs", folder)
    assert done.returncode == 1
    assert "holds nothing to compare an auxiliary model with" in done.stderr


def test_a_folder_without_runs(tmp_path: Path) -> None:
    done = report("--runs", tmp_path)
    assert done.returncode == 1
    assert "run sws quickstart or sws study first" in done.stderr
