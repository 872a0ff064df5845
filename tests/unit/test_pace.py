"""Which steps are called slow, and what is said of where the time went."""

from __future__ import annotations

from sws_dist.distributed.heartbeat import StepTimes
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.logging.throughput import SlowStepDetector


def told(*laps: list[StepTimes]) -> list[str]:
    """What is said after 20 steps of 0.1 s and ``laps``, each of all ranks."""
    said: list[str] = []
    pace = SlowStepDetector(said.append)
    for step, ranks in enumerate([[StepTimes(0.1, 0.01, 0.0)] * 2] * 20 + list(laps), start=1):
        pace.judge(StepStatus(step, [1.0, 1.0], True, False, None, ranks))
    return said


def test_only_what_is_far_beyond_the_median_and_a_second() -> None:
    assert told() == []
    assert told([StepTimes(0.9, 0.8, 0.0)] * 2) == []
    assert len(told([StepTimes(1.2, 0.8, 0.0)] * 2)) == 1


def test_the_first_steps_are_not_judged() -> None:
    said: list[str] = []
    SlowStepDetector(said.append).judge(StepStatus(1, [1.0], True, False, None, [StepTimes(90.0, 1.0, 0.0)]))
    assert said == []


def test_where_the_time_went() -> None:
    data, disk, rest = (
        [StepTimes(30.0, 0.1, 0.0), StepTimes(30.0, 28.0, 0.0)],
        [StepTimes(30.0, 0.1, 29.0), StepTimes(30.0, 0.1, 0.0)],
        [StepTimes(30.0, 0.1, 0.0)] * 2,
    )
    assert told(data) == ["step 21 took 30.0 s instead of 0.10 s: rank 1 waited 28.0 s for data"]
    assert told(disk) == ["step 21 took 30.0 s instead of 0.10 s: rank 0 wrote the log for 29.0 s"]
    assert told(rest) == ["step 21 took 30.0 s instead of 0.10 s: computing, and exchanging gradients"]
