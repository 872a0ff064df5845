"""DeepSpeed's CPUAdam, compiled at first use, and CPU offload of optimizer and parameters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sws_dist.distributed.collectives import gather_scalars
from sws_dist.zero.engine import all_weights_finite
from tests import ranks, runs
from tests.launching import Job, losses

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 1, global_batch: 16, log_every: 1}
"""


def offloaded(stage: int) -> dict[str, Any]:
    cpu = {"device": "cpu", "pin_memory": False}
    zero = {"stage": stage, "offload_optimizer": cpu} | ({"offload_param": cpu} if stage == 3 else {})
    return {"zero_optimization": zero}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeedCPUAdam is compiled at first use, which needs a C++ compiler")
    folder = tmp_path_factory.mktemp("offload")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    run, cpu_adam = folder / "run.yaml", {"optim.name": "cpu_adam"}
    jobs = [Job(run, folder / "torch", {"zero_optimization": {"stage": 2}})]
    jobs += [Job(run, folder / f"zero{stage}", offloaded(stage), cpu_adam) for stage in (1, 2, 3)]
    jobs += [Job(run, folder / "parts", offloaded(3), cpu_adam | {"train.max_steps": 2})]
    jobs += [Job(run, folder / "parts", offloaded(3), cpu_adam, resume="auto")]
    runs.train_all(jobs, 2)
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_takes_torchs_steps(trained: Path, stage: int) -> None:
    assert losses(trained / f"zero{stage}") == pytest.approx(losses(trained / "torch"), abs=1e-5)
    for name in ("learngene", "learngene_ema"):
        ours, theirs = (load_file(trained / run / f"{name}.safetensors") for run in (f"zero{stage}", "torch"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-4)


def test_it_resumes(trained: Path) -> None:
    """To rounding: DeepSpeed's CPUAdam multiplies its bias corrections up, and after a load takes a power anew."""
    assert losses(trained / "parts") == pytest.approx(losses(trained / "zero3"), abs=1e-6)
    whole, parts = (load_file(trained / run / "learngene.safetensors") for run in ("zero3", "parts"))
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-6)


def collect_on_a_gpu() -> list[str]:
    """Gather a flag from the CPU, and then what masters on the CPU say, in a group for GPUs alone, as NCCL's is.

    No GPU is needed: the device ``meta`` stands for one. What is gathered there has no value, which is said at the end.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ranks.free_port()), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("cuda:gloo")
    model = torch.nn.Linear(2, 2)
    engine: Any = SimpleNamespace(
        device=torch.device("meta"),
        module=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        zero_optimization_stage=lambda: 0,
    )
    said = []
    for collective in (lambda: gather_scalars(torch.ones(())), lambda: all_weights_finite(engine)):
        with pytest.raises(RuntimeError) as caught:
            collective()
        said.append(str(caught.value))
    return said


def test_the_state_of_masters_on_the_cpu_is_gathered_on_the_gpu() -> None:
    (said,) = ranks.run(collect_on_a_gpu, world=1)
    assert said == ["No backend type associated with device type cpu", "Tensor.item() cannot be called on meta tensors"]
