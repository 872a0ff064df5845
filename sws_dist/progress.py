"""Show how far long work is: a bar on a terminal, a line of the log each minute where there is none.

All long work shows itself in this one way. A bar appears after a second and goes away at the end, so that short work
shows nothing; it is on standard error, and rank 0's alone. In a file or the log of a batch job there are no bars.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from sws_dist.distributed.launch_env import rank
from sws_dist.units import format_duration

PATIENCE_S = 1.0
"""Seconds after which a bar appears."""
LINE_EVERY_S = 60.0
"""Seconds between two lines of the log, without a terminal."""
_BAR = "{desc:8} {percentage:3.0f} % {bar:24} {n:,.0f} of {total:,.0f}{unit}  {rate_fmt}  {remaining} left"

log = logging.getLogger(__name__)

T = TypeVar("T")


class ProgressBar:
    """Count what is done of ``total``; nothing is shown under ``--quiet``.

    Args:
        what: what is being done, in a word or two: ``scanning train``.
        unit: of what is counted: ``images``.
        done: how many of them are done already.
        in_log: whether the log of a process without a terminal gets lines too.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, *, in_log: bool = True) -> None:
        self._what, self._total, self._unit, self._done, self._first = what, total, unit, done, done
        is_shown = total > 0 and rank() == 0 and log.isEnabledFor(logging.INFO)
        self._in_log = is_shown and in_log and not sys.stderr.isatty()
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f" {unit}",
            bar_format=_BAR,
            ascii=" -=",
            dynamic_ncols=True,
            delay=PATIENCE_S,
            leave=False,
            disable=not (is_shown and sys.stderr.isatty()),
        )

    def update(self, count: int = 1) -> None:
        """Report that ``count`` more are done."""
        self._done += count
        self._bar.update(count)
        if self._in_log and (now := time.monotonic()) - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            left_s = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            log.info(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {format_duration(left_s)} left",
            )

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """Yield ``items`` and show how many of ``total`` are done; see ``ProgressBar``."""
    with ProgressBar(what, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
