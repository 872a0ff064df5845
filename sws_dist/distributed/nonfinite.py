"""Steps whose loss or gradient is infinite or NaN: named with their images, skipped as often as the config allows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sws_dist.atomic import atomic_write_json
from sws_dist.data.manifest import Manifest
from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.errors import ConfigError, RunError
from sws_dist.logging.recorder import Recorder
from sws_dist.zero.config import precision_of

_ADVICE = "A lower optim.lr, more warm-up or gradient_clipping usually helps"


class NonFiniteGuard:
    """Decides, on all ranks alike, whether such a step is skipped or the run stops.

    The step itself is left out by ``engine.step``, before anybody here knows of it: weights, optimizer and averages
    stay as they were.

    Args:
        limit: how many steps in a row may be skipped (``train.skip_nonfinite``).
        ds: the resolved DeepSpeed config.

    Raises:
        ConfigError: steps are to be skipped, but the DeepSpeed config turns off what would find them.
    """

    def __init__(self, limit: int, ds: dict[str, Any], output: Path, images: Manifest, recorder: Recorder) -> None:
        if limit and not (
            ds["zero_optimization"].get("compute_grad_norm", True)
            and ds.get("bf16", {}).get("check_grad_overflow", True)
        ):
            raise ConfigError(
                f"train.skip_nonfinite {limit}: the DeepSpeed config turns off what finds such gradients "
                "(compute_grad_norm, check_grad_overflow)"
            )
        self._limit, self._output, self._images, self._recorder = limit, output, images, recorder
        self._overflows = precision_of(ds) == "fp16"  # its loss scale is found by gradients that overflow
        self._in_a_row = 0
        self._batches: deque[tuple[int, np.ndarray]] = deque(maxlen=2)  # a step is judged while the next one runs
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        """Before a step: remember running statistics (batch norm), which forward changes."""
        if self._limit:
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def end(self, step: int, indices: Sequence[np.ndarray], applied: bool) -> None:
        """After step number ``step`` over the images ``indices`` (places in the manifest) of this rank."""
        self._batches.append((step, np.concatenate(indices)))
        if not applied:
            with torch.no_grad():
                for buffer, before in self._buffers:
                    buffer.copy_(before)

    def judge(self, answers: StepStatus) -> None:
        """A collective where something is wrong.

        Raises:
            RunError: one step too many.
        """
        bad = [(rank, loss) for rank, loss in enumerate(answers.losses) if not math.isfinite(loss)]
        if not bad and (answers.applied or self._overflows):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        file = self._output / f"nonfinite-step-{answers.step:08d}.json"
        self._write(file, answers)
        what = f"the loss is {bad[0][1]}" if bad else "the gradient is not finite"
        where = f" on rank {bad[0][0]}" if bad else ""
        found = f"{what} at step {answers.step}{where} (its images: {file})"
        if answers.applied or self._in_a_row > self._limit:
            skipped = f" after {self._limit} skipped steps (train.skip_nonfinite)" if self._limit else ""
            raise RunError(f"{found}{skipped}; the last checkpoint is untouched. {_ADVICE}")
        self._recorder.say(f"{found}: skipped, {self._in_a_row} in a row of at most {self._limit}")

    def _write(self, file: Path, answers: StepStatus) -> None:
        indices = next(indices for step, indices in self._batches if step == answers.step)
        everyone = gather_on_rank0([str(self._images.paths[i]) for i in indices])
        with raise_on_all_ranks("write which images a step had"):
            if everyone is not None:
                ranks = [
                    {"rank": rank, "loss": loss if math.isfinite(loss) else str(loss), "images": images}
                    for rank, (loss, images) in enumerate(zip(answers.losses, everyone, strict=True))
                ]
                atomic_write_json(file, {"step": answers.step, "skipped": not answers.applied, "ranks": ranks})
