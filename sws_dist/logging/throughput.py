"""What is told of a run's progress: a line of the log every so many steps, and steps that take far too long."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.logging.units import format_duration
from sws_dist.models.losses import LossParts


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: of the GPU where it trains on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class SlowStepDetector:
    """Tells of steps that take far longer than the others, and of where the time went.

    Args:
        say: told, on rank 0.
    """

    TIMES, LEAST_S, KNOWN = 5, 1.0, 10  # so many medians, at least so many seconds more, once so many steps are known

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._steps: deque[float] = deque(maxlen=101)

    def judge(self, answers: StepStatus) -> None:
        took = max(lap.seconds for lap in answers.laps)
        usual = statistics.median(self._steps) if len(self._steps) >= self.KNOWN else math.inf
        self._steps.append(took)
        if took < max(self.TIMES * usual, usual + self.LEAST_S):
            return
        data, rank = max((lap.data, rank) for rank, lap in enumerate(answers.laps))
        log = answers.laps[0].log
        if max(data, log) < took / 2:
            where = "computing, and exchanging gradients"
        else:
            late = f"rank {rank} waited {data:.1f} s for data", f"rank 0 wrote the log for {log:.1f} s"
            where = late[data < log]
        self._say(f"step {answers.step} took {took:.1f} s instead of {usual:.2f} s: {where}")


class LogWindow:
    """Sums of a ``Trainer`` between two lines of its log."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None
        self.steps, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add(self, losses: LossParts, waited: float) -> None:
        values = torch.stack(losses)
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.waited += waited

    def log(self) -> None:
        """Write the means since the last line. A collective."""
        if self.sums is None:
            return
        t = self.trainer
        total, labels, distill = (sum_over_ranks(self.sums) / (self.steps * t.world.size)).tolist()
        t.tell_of_bad_images()
        took = time.perf_counter() - self.start
        rate = self.steps * t.config.train.global_batch / took
        left = (t.total_steps - t.step) * t.config.train.global_batch / rate
        values = {"train/loss": total, "train/loss_labels": labels}
        values |= {"train/loss_distill": distill} if t.teacher is not None else {}
        values |= {
            "train/lr": t.schedule(t.step - 1),
            "train/grad_norm": t.grad_norm(),
            "perf/images_per_s": rate,
            "data/bad_images": len(t.bad),
            "perf/data_wait_share": self.waited / took,
            "perf/memory_gib": memory_gib(t.world.device),
            "perf/hours_left": left / 3600,
        }
        t.recorder.scalars(t.step, values)
        t.recorder.say(
            f"step {t.step}/{t.total_steps}  loss {total:.4f}  lr {values['train/lr']:.2e}  {rate:.0f} images/s  "
            f"waiting for data {100 * self.waited / took:.0f} %  {format_duration(left)} left"
        )
        self._reset()
