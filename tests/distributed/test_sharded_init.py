"""Test that sharded descendants start exactly from their learngene on 2, 3 and 4 ranks, with no needless traffic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.learngene.expand import expand_learngene
from sws_dist.learngene.file import describe_model, load_learngene
from sws_dist.learngene.plan import expansion_plan
from sws_dist.models import create_model
from tests import ranks, runs
from tests.distributed import sharded_init_bodies
from tests.distributed.sharded_init_bodies import GEOMETRY, SCHEDULE
from tests.launching import Job, losses

LEAN = {"stage3_param_persistence_threshold": 0}
PERSISTENT = {"stage3_param_persistence_threshold": 200}  # some parameters stay whole on every rank
CPU = {"device": "cpu", "pin_memory": False}
NEW_HEAD = {"classes": 5, "size": 48}  # 5 biases on 4 ranks: one rank's shard is all padding


def zero3(precision: str, mode: str, zero: dict[str, Any] = LEAN, **more: Any) -> dict[str, Any]:
    return {"stage": 3, "precision": precision, "mode": mode, "zero": zero, **more}


OFFLOAD = {"offload_optimizer": CPU, "offload_param": CPU, **LEAN}
BOTH_WAYS = {f"zero3-fp32-{mode}": zero3("fp32", mode) for mode in ("read", "broadcast")}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        **BOTH_WAYS,
        **{f"zero{stage}-bf16": {"stage": stage, "precision": "bf16", "mode": "read"} for stage in (0, 1, 2)},
        "zero1-fp32-broadcast": {"stage": 1, "precision": "fp32", "mode": "broadcast", **NEW_HEAD},
        **{f"half-{mode}": zero3("fp32", mode, learngene="half", **NEW_HEAD) for mode in ("read", "broadcast")},
        "half-bf16-broadcast": zero3("bf16", "broadcast", learngene="half", **NEW_HEAD),
        "offloaded": zero3("bf16", "broadcast", OFFLOAD, optimizer="cpu_adam"),
    },
    3: {
        **BOTH_WAYS,
        **{f"zero3-bf16-{mode}": zero3("bf16", mode) for mode in ("read", "broadcast")},
        "persistent-read": zero3("bf16", "read", PERSISTENT),
        "persistent-broadcast": zero3("fp32", "broadcast", PERSISTENT),
        "zero2-bf16": {"stage": 2, "precision": "bf16", "mode": "read"},
    },
    4: {
        **BOTH_WAYS,
        "new-head-read": zero3("fp32", "read", **NEW_HEAD),
        "new-head-broadcast": zero3("bf16", "broadcast", **NEW_HEAD),
        "hpz": zero3("bf16", "read", {"zero_hpz_partition_size": 2, **LEAN}),
    },
}
SPOILT = zero3("fp32", "read", spoil=True)
everywhere = pytest.mark.parametrize("found", CASES, indirect=True)


def save_learngene(
    path: Path, seed: int = 0, classes: int = 7, size: int = 32, dtype: torch.dtype = torch.float32
) -> Path:
    """Every tensor random, biases and norms too; of 12 layers some are scaled."""
    torch.manual_seed(seed)
    geometry = GEOMETRY | {"img_size": size, "num_classes": classes, "branch_scaling": 1.0}
    model = create_model("sws_vit", schedule=SCHEDULE, **geometry)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = describe_model(model, "learngene", preprocessing={"image_size": size})
    return save_model_file(path, info, model.to(dtype).state_dict())


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Run all cases of one number of ranks, in one group of them, at the first call with that number."""

    @cache
    def run(size: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("sharded_init")
        cases = CASES[size] | {"spoilt": SPOILT}
        if shutil.which("c++") is None:  # CPUAdam is compiled at first use
            cases.pop("offloaded", None)
        save_learngene(folder / "other.safetensors", seed=1)
        save_learngene(folder / "half.safetensors", dtype=torch.float16)
        file = save_learngene(folder / "learngene.safetensors")
        results, hidden = ranks.run(sharded_init_bodies.run_all, file, list(cases.values()), world=size)[0]
        numbers = sum(t.numel() for t in load_file(file).values())
        return {"numbers": numbers, "ranks": size, "hidden": hidden} | dict(zip(cases, results, strict=True))

    return run


@pytest.fixture
def found(request: pytest.FixtureRequest, run_cases: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return run_cases(request.param)


@pytest.mark.parametrize(
    ("found", "case"), [(size, case) for size, cases in CASES.items() for case in cases], indirect=["found"]
)
def test_every_rank_has_what_the_offline_expansion_has(found: dict[str, Any], case: str) -> None:
    """Masters, shards and their padding, small parameters kept whole, and the logits: all bit for bit."""
    if case not in found:
        pytest.skip("DeepSpeedCPUAdam is compiled at first use, which needs a C++ compiler")
    assert found[case]["wrong"] == []
    assert found[case]["logits_equal"]


@everywhere
def test_a_wrong_slice_is_caught(found: dict[str, Any]) -> None:
    """Negative control: masters that begin one number too early, a shard that is the neighbour's."""
    assert "blocks.0.attn.qkv.weight" in found["spoilt"]["wrong"]
    assert "master of blocks.3.mlp.fc1.weight" in found["spoilt"]["wrong"]


@everywhere
def test_reading_moves_nothing_and_reads_each_number_about_once(found: dict[str, Any]) -> None:
    read = found["zero3-fp32-read"]
    assert read["calls"] == {}
    # Rows are read whole, so neighbours overlap by one; the position embedding, a single row, is read by every rank.
    assert found["numbers"] * 4 <= read["file_bytes"] < 1.2 * found["numbers"] * 4


@everywhere
def test_broadcasting_moves_the_learngene_once(found: dict[str, Any]) -> None:
    moved = found["zero3-fp32-broadcast"]
    assert list(moved["calls"]) == ["broadcast"]
    assert moved["bytes"] == found["numbers"] * 4
    assert moved["gather_and_broadcast_bytes"] / moved["bytes"] > 4.5
    if "zero3-bf16-broadcast" in found:  # the file's fp32 too, which the masters are filled with
        assert found["zero3-bf16-broadcast"]["bytes"] == found["numbers"] * 4


@everywhere
def test_how_the_ranks_get_it_depends_on_what_they_see(found: dict[str, Any]) -> None:
    nowhere, no_file, other, other_file = found["hidden"]
    assert nowhere == other == "broadcast"
    assert "nowhere.safetensors: no such file" in no_file
    last = ", ".join(str(rank) for rank in range(1, found["ranks"]))
    assert f"rank(s) {last} see another file" in other_file


RUN = """
output: unused
model: {name: sws_vit, depth: 12, kwargs: {patch_size: 8, embed_dim: 36, num_heads: 3}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 1, global_batch: 16, log_every: 1, eval_at_start: true}
"""


def test_a_run_from_a_learngene_is_the_run_from_its_expanded_file(tmp_path: Path, few_digits: Path) -> None:
    """Step by step, under ZeRO-3 and ZeRO-1 on two ranks, and through a resume that needs the learngene no more."""
    file = save_learngene(tmp_path / "learngene.safetensors", classes=10)
    described, weights = expand_learngene(*load_learngene(file), expansion_plan(SCHEDULE, 12))
    expanded = save_model_file(tmp_path / "expanded.safetensors", described, weights)
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    run, gene = tmp_path / "run.yaml", {"model.initial_learngene": str(file)}

    def zero(stage: int) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage}}

    jobs = [Job(run, tmp_path / "offline", zero(3), {"model.initial_checkpoint": str(expanded)})]
    jobs += [Job(run, tmp_path / f"zero{stage}", zero(stage), gene) for stage in (3, 1)]
    jobs += [Job(run, tmp_path / "parts", zero(3), gene | {"train.max_steps": 2})]
    jobs += [
        Job(run, tmp_path / "parts", zero(3), {"model.initial_learngene": "gone.safetensors"}, resume="auto"),
    ]
    runs.train_all(jobs, 2)
    offline = load_file(tmp_path / "offline" / "model.safetensors")
    for name in ("zero3", "parts"):
        assert losses(tmp_path / name) == losses(tmp_path / "offline")
        ours = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(ours[key], offline[key]) for key in offline)
    assert losses(tmp_path / "zero1") == pytest.approx(losses(tmp_path / "offline"), abs=1e-5)


def test_a_config_asks_for_scaled_branches_as_sws_expand_does(tmp_path: Path) -> None:
    """The learngene was trained at its own depth alone, 16 layers: 3, 3, 4, 3, 3 become 2 each."""
    (found,) = ranks.run(sharded_init_bodies.scales, save_learngene(tmp_path / "learngene.safetensors"), world=1)
    assert found == (1.5, 1.5, 1.5, 1.5, 2.0, 2.0, 1.5, 1.5, 1.5, 1.5)
