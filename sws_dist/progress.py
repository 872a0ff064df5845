"""One line of the log: losses, speed and time to finish, averaged since the line before."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sws_dist import comm
from sws_dist.distillation import LossParts
from sws_dist.metrics import duration, memory_gib


class Window:
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
        total, labels, distill = (comm.sum_over_ranks(self.sums) / (self.steps * t.world.size)).tolist()
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
            f"waiting for data {100 * self.waited / took:.0f} %  {duration(left)} left"
        )
        self._reset()
