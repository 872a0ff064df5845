"""Runs of TLEG's auxiliary model, under each way of sharding, and descendants that start from its learngene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sws_dist
from tests import ranks, runs
from tests.launching import Job, losses

RUN = """
output: unused
model: {name: tleg_vit, depth: 4, drop_path: 0.1, kwargs: {patch_size: 8, embed_dim: 36, num_heads: 3}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.5}
train: {epochs: 2, global_batch: 16, log_every: 1, eval_every: 2, eval_depths: [3, 7]}
"""


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    """Train auxiliary models at each ZeRO stage, then descendants of three layers that start from the learngene."""
    out = tmp_path_factory.mktemp("tleg")
    run = out / "run.yaml"
    run.write_text(RUN.replace("ROOT", str(few_digits)))
    jobs = [Job(run, out / f"zero{stage}", zero(stage)) for stage in (1, 2, 3)]
    jobs += [Job(run, out / "recomputed", zero(3), {"model.grad_checkpointing": True})]
    jobs += [Job(run, out / "elastic", zero(3), {"model.elastic": {"min_depth": 2, "max_depth": 5}})]
    runs.train_all(jobs, 2)

    learngene, expanded = out / "zero2" / "learngene.safetensors", out / "expanded.safetensors"
    command = ("launcher/expand.py", "--learngene", learngene, "--depth", "3", "--out", expanded)
    done = ranks.script(*command, world=1)
    assert "3 layers theta_A + i/3 theta_B" in done.stdout
    assert done.returncode == 0
    descendant = {"model.name": "sws_vit", "model.depth": 3, "train.epochs": 1, "train.eval_depths": []}
    gene = descendant | {"model.initial_learngene": str(learngene)}
    offline = descendant | {"model.initial_checkpoint": str(expanded)}
    jobs = [Job(run, out / "offline", zero(3), offline)]
    jobs += [Job(run, out / way, zero(3), gene | {"model.expand": way}) for way in ("read", "broadcast")]
    runs.train_all(jobs, 2)
    return out


def test_sharding_and_recomputing_change_nothing(trained: Path) -> None:
    expected = losses(trained / "zero1")
    assert expected[-1] < expected[0]
    for name in ("zero2", "zero3", "recomputed"):
        assert losses(trained / name) == pytest.approx(expected, abs=2e-4)
    ours, theirs = (load_file(trained / name / "learngene.safetensors") for name in ("zero3", "zero1"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("temporary_group")
@pytest.mark.parametrize(
    ("name", "file", "depth"),
    [
        ("zero3", "learngene", 3),
        ("zero3", "learngene", 4),
        ("zero3", "learngene_ema", 7),
        ("elastic", "learngene", 7),
    ],
)
def test_an_untuned_descendant_has_the_score_of_its_depth(
    trained: Path, few_digits: Path, name: str, file: str, depth: int
) -> None:
    run = trained / name
    last = json.loads((run / "metrics.json").read_text())["history"][-1]
    group = ("val_ema" if file.endswith("ema") else "val") + ("" if depth == 4 else f"_depth{depth}")
    found = sws_dist.evaluate(sws_dist.expand(run / f"{file}.safetensors", depth), few_digits / "val")
    assert found.top1 == last[f"{group}/top1"]
    assert found.loss == pytest.approx(last[f"{group}/loss"], rel=1e-5)


def test_the_learngene_says_what_was_trained(trained: Path) -> None:
    learngene = sws_dist.load_learngene(trained / "zero3" / "learngene.safetensors")
    assert learngene.info.trained_depths == [4, 4]
    metrics = json.loads((trained / "zero3" / "metrics.json").read_text())
    assert metrics["parameters"] == learngene.num_parameters
    elastic = sws_dist.load_learngene(trained / "elastic" / "learngene.safetensors")
    assert elastic.info.trained_depths == [2, 5]


@pytest.mark.parametrize("way", ["read", "broadcast"])
def test_a_sharded_descendant_starts_from_the_expanded_weights(trained: Path, way: str) -> None:
    assert losses(trained / way) == losses(trained / "offline")
    ours, theirs = (load_file(trained / name / "model.safetensors") for name in (way, "offline"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
