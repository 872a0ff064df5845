"""Watch a run's steps: where their time goes, how large gradients and weights are, what is lost at which depth.

Every ``train.log_every`` steps what was seen becomes a line of the log, and curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sws_dist.build import RunParts
from sws_dist.build_models import step_flops
from sws_dist.distributed.phase_timer import PhaseTimer
from sws_dist.distributed.step_timer import WRITING_LOG
from sws_dist.logging.peaks import peak_flops
from sws_dist.logging.profile import StepProfiler
from sws_dist.logging.throughput import LogWindow, Progress, log_progress
from sws_dist.models.losses import LossParts
from sws_dist.progress import ProgressBar
from sws_dist.validation import log_bad_images
from sws_dist.zero.engine import time_reduction
from sws_dist.zero.norms import NormMeter


class StepWatch:
    """Watch the steps of this start of a run, on this rank.

    Args:
        parts: the run.
        taken: the numbers of the steps, counted from 1.
    """

    def __init__(self, parts: RunParts, taken: range) -> None:
        self.timer = PhaseTimer(parts.world.device)
        """Splits the time of a step; ``Trainer`` tells it which phase begins."""
        self._parts, self._last_step = parts, taken.stop - 1
        time_reduction(parts.engine, self.timer)
        self._norms = NormMeter(parts.engine)
        self._window = LogWindow(parts.config.train.global_batch, self.timer)
        steps = parts.config.train.profile if parts.world.is_rank_zero else None
        self._profiler = StepProfiler(steps, taken, parts.output / "profile", parts.world.device)
        self._bar = ProgressBar("training", parts.total_steps, "steps", done=taken.start - 1, in_log=False)
        peak = peak_flops(parts.world.device, parts.dtype)
        self._peak_flops = None if peak is None else peak * parts.world.size

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()

    def leave_out(self) -> None:
        """Leave out the time since the last step, such as that of an evaluation."""
        self._window.leave_out()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch the block, which takes step ``number``."""
        if self._is_logged(number):
            self._norms.arm()
        with self._profiler.step(number):
            yield

    def finish_step(self, number: int, losses: LossParts, waited_s: float, grad_norm: Tensor | float | None) -> None:
        """Count a step that was taken, and log it if it is due. A collective.

        Args:
            waited_s: the seconds that this rank waited for data.
            grad_norm: of the whole gradient before clipping.
        """
        parts, models = self._parts, self._parts.models
        depth = None if models.elastic is None else models.elastic.draw(number - 1)
        flops = step_flops(models.flops, models.elastic, parts.config.train.global_batch, depth)
        self._window.add(losses, waited_s, flops, depth)
        self._bar.update()
        if self._is_logged(number):
            with parts.heartbeat.phase(WRITING_LOG):
                self._log(number, None if grad_norm is None else float(grad_norm))

    def _is_logged(self, number: int) -> bool:
        return number % self._parts.config.train.log_every == 0 or number == self._last_step

    def _log(self, number: int, grad_norm: float | None) -> None:
        parts, config = self._parts, self._parts.config.train
        means = self._window.means()
        epoch = (number * config.global_batch - 1) // parts.data.order.epoch_size
        log_bad_images(parts, parts.data.bad_train, epoch, parts.data.order.epoch_size)
        now = Progress(
            step=number,
            total_steps=parts.total_steps,
            images_left=(parts.total_steps - number) * config.global_batch,
            lr=parts.lr_schedule(number - 1),
            grad_norm=math.nan if grad_norm is None else grad_norm,
            gradient_norms=self._norms.gradient_norms(grad_norm),
            weight_norms=self._norms.weight_norms(),
            num_bad_images=len(parts.data.bad_train),
            is_distilled=parts.teacher is not None,
            peak_flops=self._peak_flops,
        )
        log_progress(parts.recorder, means, now, parts.world.device)
        self._window.reset()
