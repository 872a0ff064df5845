"""Training with the Triton kernels under DeepSpeed, in the interpreter, against PyTorch's path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.launching import Job, losses, train_alone

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks in the interpreter; see tests/gpu")

RUN = """
output: unused
model:
  name: sws_vit
  schedule: [2, 1]
  drop_path: 0.2
  kwargs: {patch_size: 16, embed_dim: 64, num_heads: 2, mlp_ratio: 2.0, weight_init: jax}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, weight_decay: 0.1}
train: {epochs: 1, global_batch: 4, log_every: 1, max_steps: 4, seed: 3}
"""
RIVALS = {"attention": "flash", "linear_gelu": "torch", "add_layer_norm": "torch"}
CASES = [  # ZeRO stage, who runs the stages, recompute. That PyTorch's path is the same at every stage is test_parity's
    (2, "reference", False),
    (2, "triton", False),
    (3, "triton", False),
    (3, "triton", True),
    (3, "rivals", False),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    jobs = []
    for stage, kernels, recompute in CASES:
        ds = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
        }
        # From 0 on, ZeRO-3 keeps no parameter gathered between a stage's forward and its backward.
        ds["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        sets = {"model.kernels": "triton" if kernels == "rivals" else kernels, "model.grad_checkpointing": recompute}
        if kernels == "rivals":
            sets |= {f"model.operators.{operator}": name for operator, name in RIVALS.items()}
        jobs.append(Job(folder / "run.yaml", folder / f"zero{stage}-{kernels}-{recompute}", ds, sets))
    runs.train_all(jobs, 2)
    return folder


@pytest.mark.parametrize(("stage", "kernels", "recompute"), CASES[1:])
def test_losses_equal_the_reference(trained: Path, stage: int, kernels: str, recompute: bool) -> None:
    found, wanted = losses(trained / f"zero{stage}-{kernels}-{recompute}"), losses(trained / "zero2-reference-False")
    assert len(wanted) == 4
    assert max(wanted) - min(wanted) > 1e-3, "nothing was learnt: equal losses would show nothing"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_triton_without_a_gpu_stops_at_the_start(
    tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")  # read when the kernels are imported, which the fast ranks have done
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    done = train_alone(
        Job(tmp_path / "run.yaml", tmp_path / "run", {"gradient_clipping": 1.0}, {"model.kernels": "triton"})
    )
    assert done.returncode != 0
    assert "model.kernels: triton was asked for, but the device is cpu" in done.stdout
    assert "Traceback" not in done.stdout
