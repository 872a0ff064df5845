"""Record a run's numbers on rank 0: TensorBoard events, ``log.jsonl``, and other places that follow it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sws_dist.atomic import atomic_write_text
from sws_dist.logging.dashboard import LAYOUT, tag_of


class Recorder:
    """Write scalars, texts and images on rank 0; on the other ranks every method does nothing.

    Scalars go to TensorBoard (see ``dashboard.py``) and, one JSON object a line, to ``log.jsonl``. Where they cannot be
    written, ``failure`` is set and nothing more is tried: a rank that raised alone would leave the others waiting.

    Args:
        active: True on rank 0.
        first_step: the step after which the run goes on. What an earlier start has recorded of later steps is removed.
        is_evaluated: whether the evaluation after that step is done.
        follow: called with a step and its values by TensorBoard's names, on rank 0.
    """

    def __init__(
        self,
        output: Path,
        active: bool,
        first_step: int = 0,
        is_evaluated: bool = False,
        follow: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.active = active
        self.failure: OSError | None = None
        if not active:
            return
        self._output, self._follow = output, follow
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        self.writer.add_custom_scalars(LAYOUT)
        _forget_later_steps(output / "log.jsonl", first_step, is_evaluated)
        self._log = (output / "log.jsonl").open("a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._writing() as able:
            if able:
                tagged = {tag_of(name): value for name, value in values.items()}
                for tag, value in tagged.items():
                    self.writer.add_scalar(tag, value, step)
                if self._follow is not None:
                    self._follow(step, tagged)
                finite = {
                    name: value if math.isfinite(value) else None for name, value in values.items()
                }  # JSON has no NaN
                self._log.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
                self._log.flush()

    def text(self, name: str, text: str) -> None:
        with self._writing() as able:
            if able:
                self.writer.add_text(name, f"```\n{text}\n```")

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Write a picture: pixels [H, W, 3] uint8."""
        with self._writing() as able:
            if able:
                self.writer.add_image(name, pixels, step, dataformats="HWC")

    def hparams(self, settings: dict[str, Any], result: dict[str, float]) -> None:
        """Write the run's settings beside its final metrics, which are curves that it has, into the same event file."""
        with self._writing() as able:
            if able:
                plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
                for summary in hparams(plain, result):
                    self.writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Close the files. Raises OSError where the last lines cannot be written."""
        if not self.active:
            return
        if self.failure is None:
            self._log.close()
            self.writer.close()

    @contextmanager
    def _writing(self) -> Iterator[bool]:
        """Yield True where something is to be written; an OSError inside the block becomes ``failure``."""
        try:
            yield self.active and self.failure is None
        except OSError as error:
            self.failure = OSError(f"{self._output}: the log cannot be written ({error.strerror or error})")


def _forget_later_steps(file: Path, step: int, is_evaluated: bool) -> None:
    """Remove from ``log.jsonl`` what will be written again, and the half of a line that a kill may have left."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, step, is_evaluated)]
    if kept != lines:
        atomic_write_text(file, "".join(kept))


def _is_kept(line: str, step: int, is_evaluated: bool) -> bool:
    try:
        entry = json.loads(line)
        is_due = "val/top1" in entry and not is_evaluated  # an evaluation that the checkpoint does not know of
        return line.endswith("\n") and (entry["step"] < step or (entry["step"] == step > 0 and not is_due))
    except (ValueError, TypeError, KeyError):
        return False
