"""Traffic of a step: a stage's weights are gathered at most twice a pass, a shared gradient is reduced once."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ranks
from tests.distributed import traffic_bodies

STAGES = 5  # of the auxiliary model


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return ranks.run(traffic_bodies.count)[0]


def gathers(case: dict[str, Any], name: str) -> int:
    return max(moved["calls"].get("all_gather", 0) for moved in case[name])


def reduced(case: dict[str, Any]) -> list[int]:
    """Sum the bytes of gradients reduced in each micro-batch."""
    return [moved["bytes"].get("reduce_scatter", 0) + moved["bytes"].get("all_reduce", 0) for moved in case["backward"]]


def test_counting_counts(found: dict[str, Any]) -> None:
    assert found["known"]["inner"] == {
        "calls": {"broadcast": 1, "all_gather": 1},
        "bytes": {"broadcast": 3 * 2, "all_gather": 2 * 4 * 4},
    }
    assert found["known"]["outer"]["calls"] == {"all_reduce": 1, "broadcast": 1, "all_gather": 1}
    assert found["known"]["outer"]["bytes"]["all_reduce"] == 10 * 4


@pytest.mark.parametrize(
    ("case", "stages"),
    [
        ("auxiliary, ZeRO-3", STAGES),
        ("auxiliary, ZeRO-3, two micro-batches", STAGES),
        ("auxiliary, ZeRO-3, checkpointing", STAGES),
        ("descendant, ZeRO-3", 12),
    ],
)
def test_gathers_of_a_pass_are_at_most_two_a_stage(found: dict[str, Any], case: str, stages: int) -> None:
    """Whatever the repeats: 16 layers in 5 stages take as many as 5 layers would."""
    for name in ("forward", "backward"):
        assert gathers(found[case], name) <= 2 * stages
    gathered = sum(moved["bytes"]["all_gather"] for name in ("forward", "backward") for moved in found[case][name])
    assert gathered <= 2 * found[case]["model_bytes"] * len(found[case]["forward"])


def test_stages_are_leaves_for_a_reason(found: dict[str, Any]) -> None:
    """Control: without leaf modules every layer norm and matrix is gathered by itself."""
    assert gathers(found["auxiliary, ZeRO-3, no leaves"], "forward") > 2 * STAGES


def test_deepspeeds_defaults_keep_the_whole_model_on_every_rank(found: dict[str, Any]) -> None:
    """Control: with them nothing has to be gathered in a pass, which is what the lean settings are there to change."""
    case = found["auxiliary, ZeRO-3, DeepSpeed's defaults"]
    assert gathers(case, "forward") == gathers(case, "backward") == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_shared_gradient_is_reduced_once_a_step(found: dict[str, Any], stage: int) -> None:
    """A stage of four repeats adds its gradients up before they go anywhere."""
    case = found[f"auxiliary, ZeRO-{stage}"]
    assert reduced(case) == [case["model_bytes"]]
    two = found[f"auxiliary, ZeRO-{stage}, two micro-batches"]
    expected = [0, 1] if stage < 2 else [1, 1]  # from stage 2 on no rank keeps a whole gradient between micro-batches
    assert reduced(two) == [n * two["model_bytes"] for n in expected]
