"""A plan's memory and traffic against real runs of two ranks, at every ZeRO stage, in fp32 and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sws_dist.build_models import DTYPES
from sws_dist.config.loader import load_config
from sws_dist.plan.memory import RankMemory, rank_memory
from sws_dist.plan.run import build_on_meta, pass_memory
from sws_dist.plan.sharding import ModelSize, Sharding
from sws_dist.plan.traffic import step_collectives
from sws_dist.zero.config import resolve_deepspeed_config
from tests import ranks
from tests.distributed import plan_bodies
from tests.launching import Job

Plans = dict[str, tuple[ModelSize, Sharding, RankMemory]]
Measured = dict[str, list[dict[str, Any]]]

RUN = """
output: unused
model:
  name: sws_vit
  schedule: [2, 1, 2, 1]
  drop_path: 0.1
  kwargs: {patch_size: PATCH, embed_dim: 192, num_heads: 3}
data: {root: ROOT, image_size: 64, crop_pct: 1.0, num_threads: 1}
augment: {smoothing: 0.1}
optim: {ema_decay: 0.9}
train: {epochs: 8, global_batch: BATCH, eval_batch: 8}
"""
WIDE, DEEP = {"PATCH": "8", "BATCH": "32"}, {"PATCH": "16", "BATCH": "4"}
"""Activations are the most of a step's memory, and then gradients."""
BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, tuple[dict[str, str], int, dict[str, Any]]] = {
    "activations, ZeRO-0": (WIDE, 0, {}),
    "activations, ZeRO-3": (WIDE, 3, BF16),
    "gradients, ZeRO-1": (DEEP, 1, BF16),
    "gradients, ZeRO-2, accumulated": (DEEP, 2, {"gradient_accumulation_steps": 2}),
    "gradients, ZeRO-3, accumulated": (DEEP, 3, {"gradient_accumulation_steps": 2}),
}
STATUS_BYTES = 64
"""Norms and flags that the ranks exchange in a step; a plan leaves them out."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("plan")
    made = {}
    for number, (name, (values, stage, more)) in enumerate(CASES.items()):
        text = RUN.replace("ROOT", str(few_digits))
        for key, value in values.items():
            text = text.replace(key, value)
        config = folder / f"{number}.yaml"
        config.write_text(text)
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
        made[name] = Job(config, folder / str(number), {"zero_optimization": zero, **more})
        made[name].ds_file()
    return made


@pytest.fixture(scope="module")
def measured(jobs: dict[str, Job]) -> Measured:
    """What each rank of each run measured."""
    found = ranks.run(plan_bodies.measure_jobs, list(jobs.values()), world=2)
    return {name: [rank[number] for rank in found] for number, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def plans(jobs: dict[str, Job]) -> Plans:
    return {name: planned(job) for name, job in jobs.items()}


def planned(job: Job) -> tuple[ModelSize, Sharding, RankMemory]:
    config = load_config(job.config, job.overrides())
    size = ModelSize.of(build_on_meta(config, 10))
    sharding = Sharding.of(resolve_deepspeed_config(job.ds, config, 2), 2, is_ours=True)
    one_pass = pass_memory(config, 10, "eager timm", DTYPES[sharding.precision], None, sharding.micro_batch)
    return size, sharding, rank_memory(size, sharding, one_pass, config, teacher=0)


def test_a_dry_run_checks_prints_and_leaves_nothing(jobs: dict[str, Job]) -> None:
    job = jobs["activations, ZeRO-3"]
    output, none = job.output.with_name("dry") / "a" / "b", job.output.with_name("none")
    said, _ = ranks.run(plan_bodies.dry_run, job, [f"output={output}"], world=2)
    assert f"{output} would train from its first step" in said
    assert "1 node(s) x 2, ZeRO-3, bf16: 16 images x 1 micro-batch(es)" in said
    assert not job.output.with_name("dry").exists()
    ended, _ = ranks.outcomes(plan_bodies.dry_run, job, [f"output={none}", f"data.root={none}"], world=2)
    assert all(f"data.root {none}: there is no folder" in str(outcome.error) for outcome in ended)
    assert not none.exists()


@pytest.mark.parametrize("name", CASES)
def test_memory_is_within_a_tenth(plans: Plans, measured: Measured, name: str) -> None:
    _, _, memory = plans[name]
    assert memory.peak == pytest.approx(max(rank["peak"] for rank in measured[name]), rel=0.1)
    assert (memory.backward.total > memory.update.total) == name.startswith("activations")


@pytest.mark.parametrize("name", CASES)
def test_memory_between_steps_is_exact(plans: Plans, measured: Measured, name: str) -> None:
    """Weights and optimizer at every stage, ZeRO-3's gradients and its bucket, and the batch that the loader holds."""
    _, sharding, memory = plans[name]
    expected = memory.update.weights + memory.update.optimizer + sharding.micro_batch * 3 * 64 * 64 * 4
    if sharding.zero_stage == 3:
        expected += memory.update.gradients + sharding.bucket * sharding.element
    assert expected == pytest.approx(min(rank["before"] for rank in measured[name]), rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_traffic_is_within_a_tenth(plans: Plans, measured: Measured, name: str) -> None:
    size, sharding, _ = plans[name]
    counted = {kind: count for kind, count in measured[name][0]["traffic"].items() if count > STATUS_BYTES}
    expected = {each.kind: each.num_bytes for each in step_collectives(size, sharding)}
    assert expected == pytest.approx(counted, rel=0.1)
