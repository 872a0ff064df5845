"""Report how fast a run trains: a line of the log every ``train.log_every`` steps, and steps that take far too long."""

from __future__ import annotations

import logging
import math
import resource
import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.distributed.phase_timer import PhaseTimer
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.logging.recorder import Recorder
from sws_dist.models.losses import LossParts
from sws_dist.units import format_duration

log = logging.getLogger(__name__)


class SlowStepDetector:
    """Report steps that take far longer than the others, and where the time went.

    A step is slow if it takes at least ``FACTOR`` medians and ``MIN_EXCESS_S`` seconds more than one, once
    ``MIN_STEPS`` steps are known.
    """

    FACTOR, MIN_EXCESS_S, MIN_STEPS = 5, 1.0, 10

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=101)

    def check(self, status: StepStatus) -> None:
        took = max(times.seconds for times in status.times)
        usual = statistics.median(self._seconds) if len(self._seconds) >= self.MIN_STEPS else math.inf
        self._seconds.append(took)
        if took < max(self.FACTOR * usual, usual + self.MIN_EXCESS_S):
            return
        data, rank = max((times.data, rank) for rank, times in enumerate(status.times))
        logging_s = status.times[0].log
        if max(data, logging_s) < took / 2:
            where = "computing, and exchanging gradients"
        elif data < logging_s:
            where = f"rank 0 wrote the log for {logging_s:.1f} s"
        else:
            where = f"rank {rank} waited {data:.1f} s for data"
        log.warning("step %d took %.1f s instead of %.2f s: %s", status.step, took, usual, where)


@dataclass(frozen=True)
class WindowMeans:
    """Means over the steps since the last line of the log: losses over all ranks, times of this rank.

    Losses that are not finite are left out; where there are no others, the mean is NaN.
    """

    loss: float
    loss_labels: float
    loss_distill: float
    loss_by_depth: dict[int, float]
    """Of the depths that were drawn, where each step draws one."""
    images_per_s: float
    data_wait_share: float
    """Share of the time that rank 0 waited for data."""
    flops_per_s: float | None
    """Of all ranks; None if the operations of a step are not known."""
    phases_ms: dict[str, float]
    """Milliseconds that a step spends in each of its phases (``PhaseTimer``)."""


class LogWindow:
    """Add up losses, times and operations of this rank between two lines of the log.

    Args:
        global_batch: images of one step, over all ranks.
        timer: splits the time of the steps.
    """

    def __init__(self, global_batch: int, timer: PhaseTimer) -> None:
        self._global_batch, self._timer = global_batch, timer
        self.reset()

    def reset(self) -> None:
        """Forget what was added, and start the timer anew."""
        self._sums: Tensor | None = None
        self._by_depth: dict[int, Tensor] = {}
        self._num_steps, self._waited_s = 0, 0.0
        self._start = self._last = time.perf_counter()
        self._flops: int | None = 0
        self._timer.reset()

    def leave_out(self) -> None:
        """Leave out the time since the last step, such as that of an evaluation."""
        now = time.perf_counter()
        self._start, self._last = self._start + now - self._last, now
        self._timer.begin_step()

    def add(self, losses: LossParts, waited_s: float, flops: int | None, depth: int | None) -> None:
        """Add one step of this rank.

        Args:
            waited_s: the seconds that the rank waited for data.
            flops: operations of the step on all ranks; None: not known.
            depth: the layers that the step has drawn, the same on all ranks; None: it does not draw.
        """
        self._timer.finish_step()
        self._last = time.perf_counter()
        values = torch.stack([*losses, torch.ones_like(losses.total)])
        # A step with a loss that is not finite has been skipped, or ends the run.
        values = torch.where(values.isfinite().all(), values, 0)
        self._sums = values if self._sums is None else self._sums + values
        if depth is not None:
            found = values[[0, -1]]
            self._by_depth[depth] = self._by_depth[depth] + found if depth in self._by_depth else found
        self._num_steps += 1
        self._waited_s += waited_s
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def means(self) -> WindowMeans:
        """Return the means over the steps since the last ``reset``, one or more. A collective."""
        assert self._sums is not None
        depths = sorted(self._by_depth)
        sums = torch.cat([self._sums, *(self._by_depth[depth] for depth in depths)])
        loss, labels, distill, count, *by_depth = sum_over_ranks(sums).tolist()  # each a rank's mean over its images
        took_s = time.perf_counter() - self._start
        return WindowMeans(
            loss=_mean(loss, count),
            loss_labels=_mean(labels, count),
            loss_distill=_mean(distill, count),
            loss_by_depth={
                depth: _mean(total, n) for depth, total, n in zip(depths, by_depth[::2], by_depth[1::2], strict=True)
            },
            images_per_s=self._num_steps * self._global_batch / took_s,
            data_wait_share=self._waited_s / took_s,
            flops_per_s=None if self._flops is None else self._flops / took_s,
            phases_ms=self._timer.mean_ms(),
        )


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


@dataclass(frozen=True)
class Progress:
    """State of a run when a line of its log is written."""

    step: int
    total_steps: int
    images_left: int
    lr: float
    grad_norm: float
    gradient_norms: dict[str, float]
    weight_norms: dict[str, float]
    """The two by part of the model (``zero/norms.py``)."""
    num_bad_images: int
    is_distilled: bool
    peak_flops: float | None
    """What the ranks' GPUs can do in a second; None: not known."""


def log_progress(recorder: Recorder, means: WindowMeans, now: Progress, device: torch.device) -> None:
    """Write one line of the log, and its scalars."""
    left_s = now.images_left / means.images_per_s
    values = {"train/loss": means.loss, "train/loss_labels": means.loss_labels}
    values |= {"train/loss_distill": means.loss_distill} if now.is_distilled else {}
    values |= {f"train_depth{depth}/loss": loss for depth, loss in means.loss_by_depth.items()}
    values |= {
        "train/lr": now.lr,
        "train/grad_norm": now.grad_norm,
        "perf/images_per_s": means.images_per_s,
        "perf/bad_images": now.num_bad_images,
        "perf/data_wait_share": means.data_wait_share,
        "perf/memory_gib": peak_memory_gib(device),
        "perf/hours_left": left_s / 3600,
    }
    if means.flops_per_s is not None and now.peak_flops is not None:
        values["perf/mfu"] = means.flops_per_s / now.peak_flops
    values |= {f"time/{phase}": milliseconds for phase, milliseconds in means.phases_ms.items()}
    values |= {f"norms/gradient/{part}": norm for part, norm in now.gradient_norms.items()}
    values |= {f"norms/weights/{part}": norm for part, norm in now.weight_norms.items()}
    recorder.scalars(now.step, values)
    # Numbers of fixed width, so that the eye can run down a column.
    log.info(
        f"step {now.step:{len(str(now.total_steps))}}/{now.total_steps}  loss {means.loss:.4f}  lr {now.lr:.2e}  "
        f"{means.images_per_s:6.0f} images/s  waiting for data {100 * means.data_wait_share:3.0f} %  "
        f"{format_duration(left_s)} left"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory so far: of the GPU where it trains on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
