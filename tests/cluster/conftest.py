"""A training run of seconds, for all clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import Job

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 2], kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 24, global_batch: 12, eval_every: 24, log_every: 1, timeout_s: 20}
checkpoint: {every: 2}
"""


@pytest.fixture
def job(tmp_path: Path, few_digits: Path) -> Job:
    """160 steps of 12 images; saved every 13 or 14."""
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    return Job(tmp_path / "run.yaml", tmp_path / "run", {"zero_optimization": {"stage": 2}}, resume="auto")


@pytest.fixture
def report() -> Callable[[str, float], None]:
    """Print a measured time. The figures of docs/cluster.md: ``pytest tests/cluster -rP | grep measured``."""
    return lambda what, seconds: print(f"measured: {what}: {seconds:.1f} s")
