"""The time of a step is split into phases that add up to it."""

from __future__ import annotations

import time

import torch

from sws_dist.distributed.step_clock import BACKWARD, DATA, FORWARD, OTHER, REDUCE, StepClock

CPU = torch.device("cpu")


def spend(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_phases_add_up_to_the_step() -> None:
    clock = StepClock(CPU)
    start = time.perf_counter()
    for _ in range(4):
        clock.begin(DATA)
        spend(0.002)
        clock.begin(FORWARD)
        spend(0.004)
        clock.begin(BACKWARD)
        for _ in range(2):  # buckets of gradients, in the midst of backward
            spend(0.003)
            with clock.phase(REDUCE):
                spend(0.001)
        clock.begin(OTHER)
        clock.finish_step()
    took_ms = 1000 * (time.perf_counter() - start) / 4
    found = clock.mean_ms()
    assert sum(found.values()) <= took_ms  # so nothing counts twice
    for phase, least in ((DATA, 2), (FORWARD, 4), (BACKWARD, 6), (REDUCE, 2)):
        assert found[phase] >= least
    assert set(found) == {DATA, FORWARD, BACKWARD, REDUCE, OTHER}


def test_what_happens_before_a_reset_does_not_count() -> None:
    clock = StepClock(CPU)
    clock.begin(DATA)
    spend(0.005)
    clock.finish_step()
    clock.begin(DATA)
    clock.reset()
    assert clock.mean_ms() == {}
    clock.begin(FORWARD)
    clock.finish_step()
    assert set(clock.mean_ms()) == {OTHER, FORWARD}


def test_a_stamp_costs_microseconds() -> None:
    """A step takes about ten, and the shortest ones milliseconds."""
    clock = StepClock(CPU)
    start = time.thread_time()
    for _ in range(1000):
        for phase in (DATA, FORWARD, BACKWARD, OTHER):
            clock.begin(phase)
        clock.finish_step()
    assert (time.thread_time() - start) / 5000 < 20e-6
