"""Run benchmarks.kernels on a CPU at tiny sizes: every case is built, checked and timed, and the chart is drawn.

The times mean nothing here. The tests show that the providers compute the right thing and that a wrong one is found.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.kernels import chart, model, public_figures, training_step, tune
from benchmarks.kernels.__main__ import OPERATORS, SIZES, cases_of, run
from benchmarks.kernels.kernel_work import Kernels, total
from benchmarks.kernels.measure import Ceilings, Machine, Size, rows_of
from benchmarks.kernels.operator_case import OperatorCase, Provider
from sws_kernels import launch_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; on a GPU, make bench")
CPU = Machine("cpu", torch.float32, rounds=1)
TINY = Size("tiny", 32, batch=2, image=32, patch=16, head_dim=32, schedule=(1,), num_classes=8, teacher="test_convnext")
CEILINGS = Ceilings(copy_gb_per_s=1.0, matmul_tflop_per_s=1.0)
NEEDS_A_GPU = {
    *("SDPA cuDNN", "compile timm, cuDNN", "attention by cudnn", "triton, stages graphed", "triton, step graphed"),
}
NEEDS_A_PACKAGE = {
    *("SDPA FlashAttention 3", "SDPA FlashAttention 4", "eager add, Liger's LayerNorm", "eager add, QuACK's LayerNorm"),
    *("QuACK", "cuBLASLt GELU_AUX_BIAS", "cuBLASLt DGELU_BGRAD, eager GELU"),
}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "CHECKED_STEPS", 2)
    training_step.exact_losses.cache_clear()


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_provider_is_right_and_timed(operator: str) -> None:
    seen = set()
    for case in cases_of(operator, CPU, TINY):
        providers = list(case.providers)
        if case.operator in seen:  # a further shape runs the same code: one provider shows that the case is right
            providers = [name for name in providers if not name.startswith("triton")][:1]
        seen.add(case.operator)
        rows = rows_of(case, CPU, CEILINGS, providers)
        failed = {row["provider"]: row["error"] for row in rows if "error" in row}
        assert set(failed) <= NEEDS_A_GPU | NEEDS_A_PACKAGE, failed
        assert {row["provider"] for row in rows} == set(providers)
        for row in rows:
            assert "error" in row or (row["ms"] > 0 and ("of_copy" in row) != ("of_matmul" in row)), row


def test_the_performance_model_is_compared_with_what_was_measured_last() -> None:
    """Otherwise: python -m benchmarks.kernels.model."""
    assert (model.RESULTS / "model.md").read_text() == model.page()


def test_the_bound_of_compiled_timm_is_below_what_was_measured() -> None:
    rows = json.loads((model.RESULTS / "kernels.json").read_text())["rows"]
    steps = {row["case"]: row["ms"] for row in rows if row["provider"] == "compile timm, cuDNN" and "ms" in row}
    assert steps
    for size in SIZES.values():
        if measured := steps.get(f"{size.name}, batch {size.batch}"):
            assert 0.3 * measured < 1e3 * total(Kernels(size).compiled_timm_step(), "H200") < measured


def test_every_public_figure_has_a_source() -> None:
    figures: list[Any] = [*public_figures.ATTENTION, *public_figures.PRODUCTS, *public_figures.NORMS]
    assert {figure.source for figure in figures} == set(public_figures.SOURCES)


def test_a_wrong_provider_gets_no_time() -> None:
    (case,) = cases_of("add_layer_norm", CPU, TINY)
    assert isinstance(case, OperatorCase)
    reference = case.reference
    wrong = Provider(lambda residual, branch, weight, bias: reference(residual, 1.1 * branch, weight, bias))
    (row,) = rows_of(replace(case, providers={"wrong": wrong}), CPU, CEILINGS)
    assert "off the fp32 reference" in row["error"]
    assert "ms" not in row


def test_a_step_that_trains_otherwise_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    training_step.exact_losses(TINY, "cpu", False)  # with the right rate, and cached
    monkeypatch.setattr(training_step, "LEARNING_RATE", 0.5)
    with pytest.raises(ValueError, match="the loss before step 1"):
        training_step.StepCase(TINY, teacher=False).measure("eager timm", CPU, CEILINGS)


def test_compiled_code_is_not_another_providers() -> None:
    """torch.compile finds code by its source, so that two backends of attention would otherwise share one."""
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
    """The command runs without the trainer's dependencies, for a machine that has torch and triton only."""
    arguments = ["benchmarks.kernels", "--only", "stage", "--out", str(tmp_path / "results.json")]
    missing = ("pydantic", "deepspeed", "timm", "matplotlib", "nvidia.dali")
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({missing}); sys.argv = {arguments}; "
    code += "runpy.run_module('benchmarks.kernels', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device, so these cannot be measured: stage of Ti, S, B" in done.stdout
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("kernel", tune.CANDIDATES)
def test_a_candidate_is_what_runs(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles give the same results, and the launcher has asked for them."""
    run = tune.prepare(kernel, CPU, TINY, TINY.batch)
    expected = run()
    candidate = {  # small enough for the interpreter; the real ones are for bf16 on a GPU
        "add_layer_norm": {kernel.rpartition("_")[2]: {"R": 1}},
        "linear_gelu": {kernel.rpartition("_")[2]: {"BM": 32}},
        "packed_attention": {"forward": {"M": 16, "N": 16}, "backward_keys": {"M": 16, "N": 32}},
    }[tune.operator_of(kernel)]
    with tune.chosen(tune.operator_of(kernel), tune.Candidate(candidate)):
        asked = []
        patched = getattr(launch_config, tune.operator_of(kernel))
        monkeypatch.setattr(
            launch_config, tune.operator_of(kernel), lambda *a, **k: asked.append(patched(*a, **k)) or asked[-1]
        )
        for found, want in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        monkeypatch.undo()
    assert all(asked[0][name].items() >= changed.items() for name, changed in candidate.items())
    assert all(
        set(new.launches) <= {"forward", "backward", "backward_keys", "backward_queries"}
        for new in tune.CANDIDATES[kernel]
    )
