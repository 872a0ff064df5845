"""Split the time of training steps into phases: on a GPU by CUDA events and without waiting for it, else by the clock.

The phases follow each other, and every moment belongs to one of them: their times add up to the step's. On a GPU they
are those of its stream. What the host does while the GPU is busy costs nothing there; what the GPU waits for does.
``step_timer.py`` measures the same steps on the host alone, to find slow ones.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

DATA, TO_DEVICE, AUGMENT, TEACHER = "data", "to_device", "augment", "teacher"
FORWARD, BACKWARD, REDUCE, OPTIMIZER, OTHER = "forward", "backward", "reduce", "optimizer", "other"

Stamp = float | torch.cuda.Event


class PhaseTimer:
    """Measure how long a step spends in each phase.

    Args:
        device: the device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._finished: deque[list[tuple[str, Stamp]]] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget the step under way and all times, and begin a step."""
        self._finished.clear()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_steps = 0
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the step under way, and begin one."""
        self._phase = OTHER
        self._stamps: list[tuple[str, Stamp]] = [(OTHER, self._now())]

    def begin(self, phase: str) -> None:
        """Count the time from here on as ``phase``."""
        self._stamps.append((self._phase, self._now()))
        self._phase = phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as phase ``name``, and go on with the phase around it."""
        around = self._phase
        self.begin(name)
        try:
            yield
        finally:
            self.begin(around)

    def finish_step(self) -> None:
        """End the step; what follows is the next one's."""
        self.begin(OTHER)
        self._finished.append(self._stamps)
        self._stamps = self._stamps[-1:]
        self._add_up_finished()

    def mean_ms(self) -> dict[str, float]:
        """Return the milliseconds that a step spends in each phase: means over the steps since ``reset``.

        On a GPU, steps that it has not finished are not among them.
        """
        self._add_up_finished()
        return {phase: 1000 * seconds / self._num_steps for phase, seconds in self._seconds.items()}

    def _now(self) -> Stamp:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _is_over(stamp: Stamp) -> bool:
        return isinstance(stamp, float) or stamp.query()

    def _add_up_finished(self) -> None:
        while self._finished and self._is_over(self._finished[0][-1][1]):
            self._add_up(self._finished.popleft())

    def _add_up(self, stamps: list[tuple[str, Stamp]]) -> None:
        """Add the times of a step. Its last stamp is also the next one's first, and stays in use."""
        for (_, before), (phase, after) in pairwise(stamps):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                self._seconds[phase] += before.elapsed_time(after) / 1000
                self._spare.append(before)
            elif isinstance(before, float) and isinstance(after, float):
                self._seconds[phase] += after - before
        self._num_steps += 1
