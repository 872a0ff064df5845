"""The time of a step is split into phases that add up to it."""

from __future__ import annotations

import time

import torch

from sws_dist.distributed.phase_timer import BACKWARD, DATA, FORWARD, OTHER, REDUCE, PhaseTimer

CPU = torch.device("cpu")


def spend(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_phases_add_up_to_the_step() -> None:
    timer = PhaseTimer(CPU)
    start = time.perf_counter()
    for _ in range(4):
        timer.begin(DATA)
        spend(0.002)
        timer.begin(FORWARD)
        spend(0.004)
        timer.begin(BACKWARD)
        for _ in range(2):  # buckets of gradients, in the midst of backward
            spend(0.003)
            with timer.phase(REDUCE):
                spend(0.001)
        timer.begin(OTHER)
        timer.finish_step()
    took_ms = 1000 * (time.perf_counter() - start) / 4
    found = timer.mean_ms()
    assert sum(found.values()) <= took_ms  # so nothing counts twice
    for phase, least in ((DATA, 2), (FORWARD, 4), (BACKWARD, 6), (REDUCE, 2)):
        assert found[phase] >= least
    assert set(found) == {DATA, FORWARD, BACKWARD, REDUCE, OTHER}


def test_what_happens_before_a_reset_does_not_count() -> None:
    timer = PhaseTimer(CPU)
    timer.begin(DATA)
    spend(0.005)
    timer.finish_step()
    timer.begin(DATA)
    timer.reset()
    assert timer.mean_ms() == {}
    timer.begin(FORWARD)
    timer.finish_step()
    assert set(timer.mean_ms()) == {OTHER, FORWARD}


def test_a_stamp_costs_microseconds() -> None:
    """A step takes about ten, and the shortest ones milliseconds."""
    timer = PhaseTimer(CPU)
    start = time.thread_time()
    for _ in range(1000):
        for phase in (DATA, FORWARD, BACKWARD, OTHER):
            timer.begin(phase)
        timer.finish_step()
    assert (time.thread_time() - start) / 5000 < 20e-6
