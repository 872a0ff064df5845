"""benchmarks.kernels on a CPU at tiny sizes: every case is built, checked and timed, and the chart is drawn.

Its times mean nothing here; that its providers compute the right thing, and that a wrong one is found, does.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.kernels import chart, steps
from benchmarks.kernels.__main__ import CASES, run
from benchmarks.kernels.cases import Provider, add_layer_norm_cases
from benchmarks.kernels.measure import Ceilings, Machine, Size, rows_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's; on a GPU, make bench")
CPU = Machine("cpu", torch.float32, rounds=1)
TINY = Size("tiny", 32, batch=2, image=32, patch=16, head_dim=32, schedule=(1,), num_classes=8, teacher="test_convnext")
CEILINGS = Ceilings(copy_gb_per_s=1.0, matmul_tflop_per_s=1.0)
NEEDS_A_GPU = {"SDPA cuDNN", "compile timm, cuDNN", "triton, stages graphed", "triton, step graphed"}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CHECKED_STEPS", 2)
    steps.exact_losses.cache_clear()


@pytest.mark.parametrize("operator", CASES)
def test_every_provider_is_right_and_timed(operator: str) -> None:
    for number, case in enumerate(CASES[operator](CPU, TINY)):
        # The interpreter is slow: ours once, where an operator has several cases.
        providers = [name for name in case.providers if not (number and name.startswith("triton"))]
        rows = rows_of(case, CPU, CEILINGS, providers)
        failed = {row["provider"]: row["error"] for row in rows if "error" in row}
        assert set(failed) <= NEEDS_A_GPU, failed
        assert {row["provider"] for row in rows} == set(providers)
        for row in rows:
            assert "error" in row or (row["ms"] > 0 and ("of_copy" in row) != ("of_matmul" in row)), row


def test_a_wrong_provider_gets_no_time() -> None:
    (case,) = add_layer_norm_cases(CPU, TINY)
    wrong = Provider(lambda residual, branch, gamma, beta: case.reference(residual, 1.1 * branch, gamma, beta))
    (row,) = rows_of(replace(case, providers={"wrong": wrong}), CPU, CEILINGS)
    assert "off the fp32 reference" in row["error"]
    assert "ms" not in row


def test_a_step_that_trains_otherwise_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    steps.exact_losses(TINY, "cpu", False)  # with the right rate, and kept
    monkeypatch.setattr(steps, "LEARNING_RATE", 0.5)
    with pytest.raises(ValueError, match="the loss before step 1"):
        steps.StepCase(TINY, teacher=False).measure("eager timm", CPU, CEILINGS)


def test_compiled_code_is_not_another_providers() -> None:
    """torch.compile finds code by its source: two backends of attention would otherwise share one."""
    graphs = []

    def compiled() -> object:
        def function(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        return torch.compile(function, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    for call in (compiled(), compiled()):
        CPU.fresh()
        call(torch.zeros(2))
    assert len(graphs) == 2


def test_results_and_chart(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    results = run(CPU, ["add_layer_norm", "distillation_loss"], [TINY], out, copied=2**20, side=64)
    written = json.loads(out.read_text())
    assert written == results.to_dict()
    assert {"commit", "versions", "hardware", "ceilings", "rows"} <= set(written)
    failed = {"operator": "packed_attention", "case": "a", "provider": "SDPA cuDNN", "error": "RuntimeError: none"}
    chart.draw(written | {"rows": [*written["rows"], failed]}, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 10, "an empty picture"


def test_without_a_gpu_it_says_what_it_cannot_measure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--only", "stage", "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device, so these cannot be measured: stage of Ti, S, B" in done.stdout
    assert not (tmp_path / "results.json").exists()
