"""Count the steps of a run, and compute the learning rate of each. This module imports no torch.

``cosine`` falls from the end of the warm-up to the end of the run, so that each length of a run has rates of its own.
``wsd`` (warm-up, stable, decay) stays at the highest rate and falls in the last epochs alone, so that a run can be
stopped before them and go on to any length: Hu et al., "MiniCPM" (arXiv 2404.06395). Its decay is 1 - sqrt, the best of
those that Haegele et al. compare in "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (arXiv
2405.18392).
"""

from __future__ import annotations

import math

from sws_dist.config.schema import OptimConfig, RunConfig, TrainConfig
from sws_dist.errors import RunError


def count_steps(train: TrainConfig, epoch_size: int) -> int:
    """Return the number of optimizer steps of the whole run.

    Raises:
        RunError: a step needs more images than the run has.
    """
    num_images = train.epochs * epoch_size
    total_steps = num_images // train.global_batch
    if total_steps == 0:
        raise RunError(f"train.global_batch {train.global_batch} is more than the run's {num_images} images")
    return total_steps


class LRSchedule:
    """Compute the learning rate: linear warm-up, then ``optim.schedule`` down to ``min_lr``, all per step.

    It is a pure function of the step, so there is no state to save. Steps before ``decay_start`` do not depend on the
    length of the run.

    Args:
        config: rates, lengths and form; ``lr`` scales with ``global_batch / lr_batch``.
        steps_per_epoch: may be a fraction; epochs do not have to end with a step.
        epochs, total_steps: length of the whole run.
    """

    def __init__(
        self, config: OptimConfig, global_batch: int, steps_per_epoch: float, epochs: int, total_steps: int
    ) -> None:
        self.peak = config.lr * (global_batch / config.lr_batch if config.lr_batch else 1.0)
        self.warmup_lr, self.min_lr = config.warmup_lr, min(config.min_lr, self.peak)
        self.is_wsd = config.schedule == "wsd"
        self.total_steps = total_steps
        self.warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
        # A decay begins where an epoch has ended, so that the checkpoint of that epoch may go on to another length.
        before_decay = math.ceil((epochs - config.decay_epochs) * steps_per_epoch - 1e-6) if self.is_wsd else 0
        self.decay_start = min(max(self.warmup_steps, before_decay), total_steps)

    @classmethod
    def of_run(cls, config: RunConfig, epoch_size: int) -> LRSchedule:
        """Build the schedule of a run whose epochs have ``epoch_size`` images."""
        global_batch = config.train.global_batch
        total_steps = count_steps(config.train, epoch_size)
        return cls(config.optim, global_batch, epoch_size / global_batch, config.train.epochs, total_steps)

    def __call__(self, step: int) -> float:
        """Return the rate of the update that takes the weights from ``step`` to ``step + 1``."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / self.warmup_steps
        if step < self.decay_start:
            return self.peak
        done = min(1.0, (step - self.decay_start) / max(1, self.total_steps - self.decay_start))
        left = 1 - math.sqrt(done) if self.is_wsd else 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + (self.peak - self.min_lr) * left
