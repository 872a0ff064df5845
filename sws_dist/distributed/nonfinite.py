"""Handle steps whose loss or gradient is infinite or NaN: name their images, skip as many as the config allows."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sws_dist.atomic import atomic_write_json
from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.errors import RunError

ADVICE = "A lower optim.lr, more warm-up or gradient_clipping usually helps"

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Decide, on all ranks alike, whether a non-finite step is skipped or the run stops.

    The step itself is left out by ``zero.engine.take_step`` before this class knows of it: weights, optimizer and
    averages stay as they were.

    Args:
        limit: how many steps in a row may be skipped (``train.skip_nonfinite``).
        folder: where a file with the images of each non-finite step is written.
        image_path: maps an image's place in the manifest to its path.
    """

    def __init__(self, limit: int, folder: Path, image_path: Callable[[int], str]) -> None:
        self._limit, self._folder, self._image_path = limit, folder, image_path
        self._skipped_in_a_row = 0
        # Step, images, overflowed; a step is checked while the next one runs.
        self._latest: deque[tuple[int, np.ndarray, bool]] = deque(maxlen=2)
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def before_step(self, model: nn.Module) -> None:
        """Remember the running statistics (batch norm), which forward changes."""
        if self._limit:
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def after_step(self, step: int, indices: Sequence[np.ndarray], *, applied: bool, overflowed: bool) -> None:
        """Remember which images of this rank step number ``step`` saw; put the statistics back if it was skipped.

        Args:
            indices: places in the manifest, one array for each micro-batch.
            applied, overflowed: see ``zero.engine.StepResult``; they are the same on all ranks.
        """
        self._latest.append((step, np.concatenate(indices), overflowed))
        if not applied:
            with torch.no_grad():
                for buffer, before in self._buffers:
                    buffer.copy_(before)

    def check(self, status: StepStatus) -> None:
        """Check a step's losses and gradient. A collective where one is not finite.

        Raises:
            RunError: one step too many was not finite.
        """
        bad = [(rank, loss) for rank, loss in enumerate(status.losses) if not math.isfinite(loss)]
        indices, overflowed = next((seen, over) for step, seen, over in self._latest if step == status.step)
        if not bad and status.applied:
            self._skipped_in_a_row = 0
        if not bad and (status.applied or overflowed):
            return
        self._skipped_in_a_row += 1
        file = self._folder / f"nonfinite-step-{status.step:08d}.json"
        self._write(file, status, indices)
        what = f"the loss is {bad[0][1]}" if bad else "the gradient is not finite"
        where = f" on rank {bad[0][0]}" if bad else ""
        found = f"{what} at step {status.step}{where} (its images: {file})"
        if status.applied or self._skipped_in_a_row > self._limit:
            skipped = f" after {self._limit} skipped steps (train.skip_nonfinite)" if self._limit else ""
            raise RunError(f"{found}{skipped}; the last checkpoint is untouched. {ADVICE}")
        log.warning("%s: skipped, %d in a row of at most %d", found, self._skipped_in_a_row, self._limit)

    def _write(self, file: Path, status: StepStatus, indices: np.ndarray) -> None:
        """Write which images each rank's step saw. A collective."""
        paths = gather_on_rank0([self._image_path(int(index)) for index in indices])
        with raise_on_all_ranks("write which images a step had"):
            if paths is not None:
                ranks = [
                    {"rank": rank, "loss": loss if math.isfinite(loss) else str(loss), "images": images}
                    for rank, (loss, images) in enumerate(zip(status.losses, paths, strict=True))
                ]
                atomic_write_json(file, {"step": status.step, "skipped": not status.applied, "ranks": ranks})
