"""Which steps are called slow, and what is said of where the time went."""

from __future__ import annotations

from sws_dist.progress import Pace
from sws_dist.rollcall import Answers
from sws_dist.watch import Lap


def told(*laps: list[Lap]) -> list[str]:
    """What is said after 20 steps of 0.1 s and ``laps``, each of all ranks."""
    said: list[str] = []
    pace = Pace(said.append)
    for step, ranks in enumerate([[Lap(0.1, 0.01, 0.0)] * 2] * 20 + list(laps), start=1):
        pace.judge(Answers(step, [1.0, 1.0], True, False, None, ranks))
    return said


def test_only_what_is_far_beyond_the_median_and_a_second() -> None:
    assert told() == []
    assert told([Lap(0.9, 0.8, 0.0)] * 2) == []
    assert len(told([Lap(1.2, 0.8, 0.0)] * 2)) == 1


def test_the_first_steps_are_not_judged() -> None:
    said: list[str] = []
    Pace(said.append).judge(Answers(1, [1.0], True, False, None, [Lap(90.0, 1.0, 0.0)]))
    assert said == []


def test_where_the_time_went() -> None:
    data, disk, rest = (
        [Lap(30.0, 0.1, 0.0), Lap(30.0, 28.0, 0.0)],
        [Lap(30.0, 0.1, 29.0), Lap(30.0, 0.1, 0.0)],
        [Lap(30.0, 0.1, 0.0)] * 2,
    )
    assert told(data) == ["step 21 took 30.0 s instead of 0.10 s: rank 1 waited 28.0 s for data"]
    assert told(disk) == ["step 21 took 30.0 s instead of 0.10 s: rank 0 wrote the log for 29.0 s"]
    assert told(rest) == ["step 21 took 30.0 s instead of 0.10 s: computing, and exchanging gradients"]
