"""Training on a GPU: every precision and ZeRO stage through the real launcher, images decoded on the GPU.

fp16 and DeepSpeed's FusedAdam exist only here; bf16 and fp32 are the same runs as on the CPU, on other kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import Job, log, train

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

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
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(digits_root)))
    ds: dict[str, Any] = {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
    if precision != "fp32":
        ds[precision] = {"enabled": True} | ({"initial_scale_power": 10} if precision == "fp16" else {})
    job = Job(tmp_path / "run.yaml", tmp_path / "run", ds, {"optim.name": optimizer})
    done = train(job, ranks=1)
    assert done.returncode == 0, done.stdout[-6000:]
    losses = [entry["train/loss"] for entry in log(tmp_path / "run") if "train/loss" in entry]
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["precision"] == precision
    assert metrics["top1"] > 0.15  # ten classes: chance is 0.10
