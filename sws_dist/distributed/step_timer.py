"""Account for the time of each step: all of it, and how much of it a rank waited for data or wrote the log."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import NamedTuple

DATA, LOG, SAVE = "waiting for data", "writing the log", "saving"


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
        times = StepTimes(now - self._start, self._seconds[DATA], self._seconds[LOG])
        self._start = now
        self._seconds.clear()
        return times
