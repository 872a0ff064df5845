"""Record a run's numbers on rank 0: TensorBoard events, ``log.jsonl``, and a progress bar in a terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

log = logging.getLogger(__name__)


class Recorder:
    """Write scalars, texts and images on rank 0; on the other ranks every method does nothing.

    Scalars go to TensorBoard under ``group/name`` and, one JSON object a line, to ``log.jsonl``. Where they cannot be
    written, ``failure`` is set and nothing more is tried: a rank that raised alone would leave the others waiting.

    Args:
        active: True on rank 0.
    """

    def __init__(self, output: Path, active: bool, total_steps: int, first_step: int = 0) -> None:
        self.active = active
        self.failure: OSError | None = None
        if not active:
            return
        self._output = output
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._log = (output / "log.jsonl").open("a")
        show_bar = sys.stderr.isatty() and log.isEnabledFor(logging.INFO)  # not under --quiet
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not show_bar, leave=False)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.active:
            self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._writing() as able:
            if able:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
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
        """Write the run's settings beside its final metrics, into the same event file."""
        with self._writing() as able:
            if able:
                plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
                for summary in hparams(plain, result):
                    self.writer._get_file_writer().add_summary(summary)
                for name, value in result.items():
                    self.writer.add_scalar(name, value)

    def close(self) -> None:
        """Close the files. Raises OSError where the last lines cannot be written."""
        if not self.active:
            return
        self._bar.close()
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
