"""Train on a GPU: every precision and ZeRO stage through the real launcher, with images decoded on the GPU.

Only here do runs use fp16 and DeepSpeed's FusedAdam; bf16 and fp32 runs are those on the CPU with other kernels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from sws_dist.checkpoint.checkpoint import read_state
from sws_dist.checkpoint.folders import list_checkpoints

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)
pytest.importorskip("deepspeed")

from tests.launching import Job, log, losses, train

pytestmark = pytest.mark.gpu

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], drop_path: 0.1, kwargs: {patch_size: 8, embed_dim: 64, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, device: gpu}
augment: {auto_augment: rand-m9-mstd0.5-inc1, re_prob: 0.25, mixup: 0.8, cutmix: 1.0, smoothing: 0.1}
optim: {lr: 2e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 4, global_batch: 64, log_every: 5, eval_every: 4}
"""


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adam"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_trains_and_saves(tmp_path: Path, digits_root: Path, stage: int, precision: str, optimizer: str) -> None:
    if optimizer == "fused_adam" and CUDA_HOME is None:
        pytest.skip("DeepSpeed compiles its FusedAdam, and there is no nvcc (torch finds no CUDA_HOME)")
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))
    ds: dict[str, Any] = {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
    if precision != "fp32":
        ds[precision] = {"enabled": True} | ({"initial_scale_power": 10} if precision == "fp16" else {})
    job = Job(tmp_path / "run.yaml", tmp_path / "run", ds, {"optim.name": optimizer})
    done = train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-6000:]
    entries = [entry for entry in log(tmp_path / "run") if "train/loss" in entry]
    assert entries[-1]["train/loss"] < entries[0]["train/loss"]
    step_ms = sum(value for name, value in entries[-1].items() if name.startswith("time/"))  # by CUDA events
    assert 1000 * 64 / entries[-1]["perf/images_per_s"] == pytest.approx(step_ms, rel=0.2)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["precision"] == precision
    assert metrics["top1"] > 0.15  # ten classes: chance is 0.10


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_and_saves_with_masters_on_the_cpu(tmp_path: Path, digits_root: Path, stage: int) -> None:
    if CUDA_HOME is None or shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its CPUAdam, and there is no nvcc or no C++ compiler")
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))
    cpu = {"device": "cpu", "pin_memory": True}
    zero = {"stage": stage, "offload_optimizer": cpu} | ({"offload_param": cpu} if stage == 3 else {})
    ds = {"zero_optimization": zero, "bf16": {"enabled": True}}
    job = Job(tmp_path / "run.yaml", tmp_path / "run", ds, {"optim.name": "cpu_adam", "train.epochs": 1})
    done = train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-6000:]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (0, 3)])
def test_fp16_goes_on_where_it_stopped(tmp_path: Path, digits_root: Path, before: int, after: int) -> None:
    """The loss scale is restored, also at another stage. Sums have no fixed order, so losses agree up to rounding."""
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))

    def job(name: str, stage: int, **sets: Any) -> Job:
        # The scale doubles every four steps from a small start, so a forgotten one would show in every gradient.
        fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 4}
        ds = {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "fp16": fp16}
        return Job(tmp_path / "run.yaml", tmp_path / name, ds, {"train.log_every": 1, **sets}, resume="auto")

    for run in (job("whole", before), job("parts", before, **{"train.max_steps": 30}), job("parts", after)):
        done = train(run, ranks=1)
        assert done.returncode == 0, done.stdout[-6000:]
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == len(parts)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=2e-2, atol=2e-2)
    scales = []
    for name in ("whole", "parts"):
        newest = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        scales.append(read_state(newest).loss_scaler["cur_scale"])
    assert scales[0] == scales[1] > 16


# The quickstart's auxiliary model (configs/runs/quickstart/auxiliary.yaml), without its teacher.
AUXILIARY = """
output: unused
model: {name: sws_vit, schedule: [2, 2, 2, 2, 2], kwargs: {patch_size: 8, embed_dim: 96, num_heads: 3}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, device: cpu}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 1, global_batch: 32, log_every: 1, max_steps: 20}
"""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_twenty_steps_with_the_kernels_follow_pytorch(
    tmp_path: Path, digits_root: Path, precision: str, tolerance: float
) -> None:
    """The loss curves agree within rounding, which 20 steps of Adam enlarge; the tolerances are a first guess."""
    (tmp_path / "run.yaml").write_text(AUXILIARY.replace("ROOT", str(digits_root)))
    ds: dict[str, Any] = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    if precision != "fp32":
        ds[precision] = {"enabled": True}
    curves = {}
    for kernels in ("triton", "reference"):
        job = Job(tmp_path / "run.yaml", tmp_path / kernels, ds, {"model.kernels": kernels})
        done = train(job, ranks=1)
        assert done.returncode == 0, done.stdout[-6000:]
        curves[kernels] = torch.tensor(losses(tmp_path / kernels))
    assert len(curves["triton"]) == 20
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_cuda_graphs_change_no_loss(tmp_path: Path, digits_root: Path, stage: int) -> None:
    """The run has DeepSpeed's gradient hooks, two micro-batches a step, drop-path and evaluations of another size."""
    (tmp_path / "run.yaml").write_text(AUXILIARY.replace("ROOT", str(digits_root)))
    ds = {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    ds |= {"train_micro_batch_size_per_gpu": 16}
    curves = {}
    for graphs in (True, False):
        sets = {"model.kernels": "triton", "model.cuda_graphs": graphs, "model.drop_path": 0.2}
        job = Job(tmp_path / "run.yaml", tmp_path / f"graphs-{graphs}", ds, sets)
        done = train(job, ranks=1)
        assert done.returncode == 0, done.stdout[-6000:]
        assert ("a CUDA graph" in done.stdout) == graphs
        curves[graphs] = torch.tensor(losses(tmp_path / f"graphs-{graphs}"))
    assert len(curves[True]) == 20
    torch.testing.assert_close(curves[True], curves[False], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("option", ["model.grad_checkpointing", "model.compile"])
def test_the_kernels_train_with(tmp_path: Path, digits_root: Path, stage: int, option: str) -> None:
    if stage == 3 and option == "model.compile":
        pytest.skip("model.compile is not for ZeRO-3")
    (tmp_path / "run.yaml").write_text(AUXILIARY.replace("ROOT", str(digits_root)))
    ds = {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    job = Job(tmp_path / "run.yaml", tmp_path / "run", ds, {"model.kernels": "triton", option: True})
    done = train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-6000:]
    curve = losses(tmp_path / "run")
    assert curve[-1] < curve[0]


@pytest.mark.skipif(CUDA_HOME is None, reason="DeepSpeed compiles its FusedAdam, and there is no nvcc")
@pytest.mark.parametrize("stage", [0, 2])
def test_fused_adam_goes_on_with_its_moments(tmp_path: Path, digits_root: Path, stage: int) -> None:
    """At stage 0 in fp32 each parameter is a master, and only the last one of a group counts steps."""
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))

    def job(name: str, **sets: Any) -> Job:
        ds = {"zero_optimization": {"stage": stage}}
        sets |= {"optim.name": "fused_adam", "train.log_every": 1}
        return Job(tmp_path / "run.yaml", tmp_path / name, ds, sets, resume="auto")

    for run in (job("whole"), job("parts", **{"train.max_steps": 30}), job("parts")):
        done = train(run, ranks=1)
        assert done.returncode == 0, done.stdout[-6000:]
    newest = list_checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    assert read_state(newest).optimizer_steps == read_state(newest).step
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=2e-2, atol=2e-2)
