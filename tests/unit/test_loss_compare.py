"""benchmarks/loss_compare.py: what it says of two runs' logs and weights, from real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.loss_compare import Comparison, compare

Weights = dict[str, torch.Tensor]


def losses(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": value} for step, value in enumerate(values, start=1)]


def write_run(folder: Path, entries: list[dict[str, Any]], **weights: torch.Tensor) -> Path:
    """Write what the comparison reads of a run; the time and the speed are never the same twice."""
    folder.mkdir()
    lines = [json.dumps(entry | {"time": id(entry), "perf/images_per_s": id(folder)}) for entry in entries]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    save_file(weights, folder / "model.safetensors")
    return folder


def compared(tmp_path: Path, before: Any, after: Any, rtol: float = 0.0, atol: float = 0.0) -> Comparison:
    """Write two runs, each given as its log and its weights, and compare them."""
    runs = [write_run(tmp_path / name, log, **kept) for name, (log, kept) in (("b", before), ("a", after))]
    return compare("case", runs[0], runs[1], rtol, atol)


def weights(**changed: torch.Tensor) -> Weights:
    return {"head.bias": torch.zeros(2), "head.weight": torch.ones(2, 3), **changed}


def test_identical_runs(tmp_path: Path) -> None:
    log = [*losses(2.0, None), {"step": 2, "val/top1": 0.5}]
    run = (log, weights(count=torch.tensor(7), unused=torch.tensor([float("nan")])))
    found = compared(tmp_path, run, run)
    assert found.verdict == "identical bit for bit"
    assert [(d.name, d.compared) for d in found.quantities] == [("train/loss", 2), ("val/top1", 1)]
    line = "case: identical bit for bit (2 steps of 2 quantities; 4 tensors of model.safetensors)"
    assert list(found.lines()) == [line]


def test_differing_losses(tmp_path: Path) -> None:
    found = compared(tmp_path, (losses(2.0, 4.0, 1.0), weights()), (losses(2.0, 4.5, 1.25), weights()))
    assert found.verdict == "DIFFERENT"
    loss = found.quantities[0]
    assert (loss.compared, loss.differing, loss.first, loss.worst) == (3, 2, "step 2", "step 2")
    assert (loss.max_abs, loss.max_rel) == (0.5, 0.25)
    assert any("train/loss" in line and "step 2" in line for line in found.lines())


@pytest.mark.parametrize(("rtol", "verdict"), [(0.3, "within the tolerance"), (0.1, "DIFFERENT")])
def test_tolerance(tmp_path: Path, rtol: float, verdict: str) -> None:
    changed = weights(**{"head.weight": torch.ones(2, 3) + 0.25})
    assert compared(tmp_path, (losses(4.0), weights()), (losses(4.5), changed), rtol).verdict == verdict


def test_a_loss_that_is_finite_on_one_side_only(tmp_path: Path) -> None:
    found = compared(tmp_path, (losses(2.0), weights()), (losses(None), weights()), rtol=1e9, atol=1e9)
    assert found.verdict == "DIFFERENT"
    assert found.quantities[0].max_abs > 1e300


def test_differing_weights(tmp_path: Path) -> None:
    changed = weights(**{"head.bias": torch.tensor([0.0, 0.5]), "head.weight": torch.ones(2, 3) + 0.25})
    found = compared(tmp_path, (losses(2.0), weights()), (losses(2.0), changed))
    file = found.weights[0]
    assert found.verdict == "DIFFERENT"
    assert (file.compared, file.differing, file.worst, file.max_abs) == (2, 2, "head.bias", 0.5)


def test_the_sign_of_zero_is_a_bit(tmp_path: Path) -> None:
    negative = weights(**{"head.bias": -torch.zeros(2)})
    found = compared(tmp_path, (losses(2.0), weights()), (losses(2.0), negative))
    assert (found.verdict, found.weights[0].max_abs) == ("DIFFERENT", 0.0)


def test_missing_step(tmp_path: Path) -> None:
    found = compared(tmp_path, (losses(2.0, 1.0), weights()), (losses(2.0), weights()), rtol=1.0)
    assert found.problems == ["only before has train/loss at step 2"]
    assert (found.verdict, found.steps) == ("DIFFERENT", [1])


def test_missing_value(tmp_path: Path) -> None:
    entries = [losses(2.0)[0] | {"train/grad_norm": 1.0}]
    found = compared(tmp_path, (losses(2.0), weights()), (entries, weights()), rtol=1.0)
    assert found.problems == ["only after has train/grad_norm at step 1"]


def test_nothing_in_common(tmp_path: Path) -> None:
    found = compared(tmp_path, (losses(), weights()), (losses(), weights()))
    assert (found.verdict, len(found.problems)) == ("DIFFERENT", 1)


def test_different_tensor_names_and_shapes(tmp_path: Path) -> None:
    before = weights(norm=torch.ones(3))
    after = weights(norms=torch.ones(3)) | {"head.bias": torch.zeros(3)}
    found = compared(tmp_path, (losses(2.0), before), (losses(2.0), after), rtol=1.0)
    assert found.verdict == "DIFFERENT"
    assert found.problems == [
        "only before has model.safetensors's tensor norm",
        "only after has model.safetensors's tensor norms",
    ]
    assert found.weights[0].worst == "head.bias (torch.float32 [2] to torch.float32 [3])"


def test_steps_before_a_resume_are_left_out(tmp_path: Path) -> None:
    before, after = losses(9.0, 1.0), losses(2.0, 1.0)
    runs = [write_run(tmp_path / name, log, **weights()) for name, log in (("b", before), ("a", after))]
    found = compare("case", runs[0], runs[1], begin=1)
    assert (found.verdict, found.steps) == ("identical bit for bit", [2])
