"""A run that trains and scores many depths: its descendants are what it has scored, untuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sws_dist
from sws_dist.config.schema import ElasticConfig
from sws_dist.learngene.elastic import ElasticDepth
from tests import runs
from tests.launching import Job

RUN = """
output: unused
model:
  name: sws_vit
  schedule: [1, 2, 1]
  elastic: {min_depth: 3, max_depth: 6}
  kwargs: {patch_size: 8, embed_dim: 32, num_heads: 2}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.5}
train: {epochs: 2, global_batch: 16, log_every: 1, eval_every: 2, eval_depths: [2, 3, 7], eval_plan: spaced}
"""
STEPS = 10


@pytest.fixture(scope="module", params=[2, 3])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    folder = tmp_path_factory.mktemp(f"elastic{request.param}")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    runs.train_all([Job(folder / "run.yaml", folder / "run", {"zero_optimization": {"stage": request.param}})], 2)
    return folder / "run"


@pytest.mark.usefixtures("temporary_group")
@pytest.mark.parametrize("file", ["learngene", "learngene_ema"])
@pytest.mark.parametrize("depth", [2, 3, 4, 7])
def test_an_untuned_descendant_has_the_score_of_its_depth(run: Path, few_digits: Path, file: str, depth: int) -> None:
    plan = "even" if depth == 4 else "spaced"  # at 2 layers it leaves the last stage out
    last = json.loads((run / "metrics.json").read_text())["history"][-1]
    group = ("val_ema" if file.endswith("ema") else "val") + ("" if depth == 4 else f"_depth{depth}")
    found = sws_dist.evaluate(sws_dist.expand(run / f"{file}.safetensors", depth, plan=plan), few_digits / "val")
    assert found.top1 == last[f"{group}/top1"]
    assert found.loss == pytest.approx(last[f"{group}/loss"], rel=1e-5)


def test_each_depth_has_its_own_curve(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"val/top1", "val/top1_ema", "depth/val_top1/3", "depth/val_top1/7", "depth/val_top1_ema/7"} <= tags
    last = json.loads((run / "metrics.json").read_text())["history"][-1]
    assert events.Scalars("depth/val_loss_ema/7")[-1].value == pytest.approx(last["val_ema_depth7/loss"])
    # Each step is logged, and draws one depth: its loss is the step's.
    elastic = ElasticDepth(ElasticConfig(min_depth=3, max_depth=6), (1, 2, 1), 0, STEPS)
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    for depth in elastic.depths:
        drawn = {step: losses[step] for step in losses if elastic.draw(step - 1) == depth}
        found = {event.step: event.value for event in events.Scalars(f"depth/train_loss/{depth}")} if drawn else {}
        assert found == drawn


def test_operations_are_those_of_the_layers_that_ran(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    draws = ElasticDepth(ElasticConfig(min_depth=3, max_depth=6), (1, 2, 1), 0, STEPS).count_steps(STEPS)
    layers = sum(depth * count for depth, count in draws.items())
    own = 16 * 3 * metrics["flops_forward"] * STEPS
    # A layer takes nearly all operations of this model: they are in proportion to the layers.
    assert metrics["flops"] / own == pytest.approx(layers / (4 * STEPS), rel=0.05)
    assert sws_dist.load_learngene(run / "learngene.safetensors").info.trained_depths == [3, 6]
