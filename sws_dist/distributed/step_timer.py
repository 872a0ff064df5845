"""Measure each step on the host: all of its time, and how much of it a rank waited for data or wrote the log.

Slow steps are found by these times; ``phase_timer.py`` splits a step into the phases that TensorBoard shows.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import NamedTuple

WAITING_FOR_DATA, WRITING_LOG, SAVING = "waiting for data", "writing the log", "saving"
"""Phases of a rank, as its heartbeat names them."""


class StepTimes(NamedTuple):
    """Seconds of one step: all of them, those spent waiting for data, and those spent writing the log."""

    seconds: float
    data: float
    log: float


class StepTimer:
    """Measure steps one after another; the time between two calls of ``finish_step`` belongs to one step."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, phase: str, seconds: float) -> None:
        """Count ``seconds`` of the current step as spent in ``phase``."""
        self._seconds[phase] += seconds

    def finish_step(self) -> StepTimes:
        """Return the times of the current step and begin the next one."""
        now = time.monotonic()
        times = StepTimes(now - self._start, self._seconds[WAITING_FOR_DATA], self._seconds[WRITING_LOG])
        self._start = now
        self._seconds.clear()
        return times
