"""Test which steps are reported as slow, and what the report says about where the time went."""

from __future__ import annotations

import math
import time

import pytest
import torch

from sws_dist.distributed.phase_timer import PhaseTimer
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.distributed.step_timer import StepTimes
from sws_dist.logging.throughput import LogWindow, SlowStepDetector
from sws_dist.models.losses import LossParts


def reported(caplog: pytest.LogCaptureFixture, *steps: list[StepTimes]) -> list[str]:
    """Return what is reported after 20 steps of 0.1 s and ``steps``, each with the times of all ranks."""
    caplog.clear()
    detector = SlowStepDetector()
    for step, times in enumerate([[StepTimes(0.1, 0.01, 0.0)] * 2] * 20 + list(steps), start=1):
        detector.check(StepStatus(step, [1.0, 1.0], True, False, False, None, times))
    return caplog.messages


def test_only_steps_far_beyond_the_median_and_a_second_are_slow(caplog: pytest.LogCaptureFixture) -> None:
    assert reported(caplog) == []
    assert reported(caplog, [StepTimes(0.9, 0.8, 0.0)] * 2) == []
    assert len(reported(caplog, [StepTimes(1.2, 0.8, 0.0)] * 2)) == 1


def test_the_first_steps_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    SlowStepDetector().check(StepStatus(1, [1.0], True, False, False, None, [StepTimes(90.0, 1.0, 0.0)]))
    assert caplog.messages == []


def test_the_report_says_where_the_time_went(caplog: pytest.LogCaptureFixture) -> None:
    data, disk, rest = (
        [StepTimes(30.0, 0.1, 0.0), StepTimes(30.0, 28.0, 0.0)],
        [StepTimes(30.0, 0.1, 29.0), StepTimes(30.0, 0.1, 0.0)],
        [StepTimes(30.0, 0.1, 0.0)] * 2,
    )
    slow = "step 21 took 30.0 s instead of 0.10 s:"
    assert reported(caplog, data) == [f"{slow} rank 1 waited 28.0 s for data"]
    assert reported(caplog, disk) == [f"{slow} rank 0 wrote the log for 29.0 s"]
    assert reported(caplog, rest) == [f"{slow} computing, and exchanging gradients"]


def test_an_evaluation_between_two_lines_takes_no_step_and_no_time_from_the_means() -> None:
    window = LogWindow(16, PhaseTimer(torch.device("cpu")))
    window.leave_out()
    for loss, depth in ((1.0, 5), (3.0, 10)):
        time.sleep(0.01)
        window.add(LossParts(*torch.full((3,), loss)), 0.001, 10, depth)
        time.sleep(2.0)  # the end of an epoch
        window.leave_out()
    means = window.means()
    assert means.loss == 2.0
    assert means.loss_by_depth == {5: 1.0, 10: 3.0}
    assert means.images_per_s > 32 / 2
    assert sum(means.phases_ms.values()) < 1000


def test_a_loss_that_is_not_finite_is_left_out_of_the_means() -> None:
    window = LogWindow(16, PhaseTimer(torch.device("cpu")))
    for total, depth in ((1.0, 5), (math.nan, 5), (3.0, 10), (math.inf, 15)):
        window.add(LossParts(torch.tensor(total), torch.tensor(2.0), torch.tensor(0.0)), 0.001, 10, depth)
    means = window.means()
    assert (means.loss, means.loss_labels) == (2.0, 2.0)
    assert (means.loss_by_depth[5], means.loss_by_depth[10]) == (1.0, 3.0)
    assert math.isnan(means.loss_by_depth[15])
    window.reset()
    window.add(LossParts(*torch.full((3,), math.nan)), 0.001, 10, None)
    assert math.isnan(window.means().loss)
