"""Trace a few steps of a run with torch's profiler (``train.profile``), on rank 0."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_NUM_NAMED = 5

log = logging.getLogger(__name__)


class StepProfiler:
    """Trace the steps from the first to the last of ``steps``, which are counted from 1 as in the log.

    The trace, ``PROFILE/steps-A-B.pt.trace.json.gz``, opens in Perfetto, in chrome://tracing, and in TensorBoard with
    the plugin ``torch-tb-profiler``. A line of the log names the operators that took longest.

    Args:
        steps: first and last step; None: nothing is traced.
        taken: the steps of this start of the run.
        folder: PROFILE.
        device: the device that trains.
    """

    def __init__(self, steps: tuple[int, int] | None, taken: range, folder: Path, device: torch.device) -> None:
        self._folder, self._on_gpu = folder, device.type == "cuda"
        self._due = range(0) if steps is None else range(max(steps[0], taken.start), min(steps[1] + 1, taken.stop))
        self._profiler: Any = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's tracer reports its stages on standard error
        if steps is not None and not self._due:
            now = f"{taken.start} to {taken.stop - 1}"
            log.warning(f"train.profile {list(steps)}: nothing is traced, since this start takes the steps {now}")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the block, which takes step ``number``, if it is one of those to be traced."""
        if self._due and number == self._due[0]:
            self._profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu])
            self._profiler.start()
        yield
        if self._due and number == self._due[-1]:
            self._write()
            self._profiler = None

    def _write(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        file = self._folder / f"steps-{self._due[0]}-{self._due[-1]}.pt.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            log.warning("%s: the trace cannot be written (%s)", file, error)
            return
        log.info(f"profile  {file}: {self._describe()}")

    def _describe(self) -> str:
        """Return the operators that took longest, with their shares of the time of all."""
        unit = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        operators = sorted(self._profiler.key_averages(), key=lambda event: -getattr(event, unit))
        total = sum(getattr(event, unit) for event in operators) or 1
        return ", ".join(f"{event.key} {getattr(event, unit) / total:.0%}" for event in operators[:_NUM_NAMED])
