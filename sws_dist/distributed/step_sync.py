"""What the ranks tell each other after every step, so that all of them go on or all of them stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sws_dist.data.loader import Batch
from sws_dist.distributed.collectives import gather_rows
from sws_dist.distributed.heartbeat import StepTimes
from sws_dist.distributed.signals import requested_signal, signal_name


class StepStatus(NamedTuple):
    """Of all ranks after one step, each list in the order of the ranks."""

    step: int
    """Counted from 1."""
    losses: list[float]
    applied: bool
    """Whether the weights were updated (the same on all ranks)."""
    failed: bool
    """Whether any rank cannot go on."""
    told: str | None
    """Which signal reached which rank, if any did."""
    laps: list[StepTimes]
    """How long the step took."""


class StepSync:
    """The ranks' answers, read one step late: by then they have arrived without making the device wait.

    All ranks read the same table, so they decide alike.

    Args:
        judges: each is given the answers, on all ranks, and may raise.
    """

    def __init__(self, judges: Sequence[Callable[[StepStatus], None]]) -> None:
        self._judges = judges
        self._step, self._table, self._unread = 0, torch.empty(0), False

    def call(self, step: int, loss: Tensor, lap: StepTimes, *, applied: bool, failed: bool) -> None:
        """Give this rank's answers, see ``Answers``; ``loss`` [] on the device. A collective."""
        own = torch.tensor([applied, failed, requested_signal(), *lap], dtype=loss.dtype)
        row = torch.cat([loss.reshape(1), own.to(loss.device, non_blocking=True)])
        self._step, self._table, self._unread = step, gather_rows(row), True

    def read(self) -> str | None:
        """Let the judges see the answers to the latest call, once. Returns ``told``."""
        if not self._unread:
            return None
        self._unread = False
        losses, applied, failed, told, *times = self._table.T.tolist()
        first = next((f"{signal_name(number)} on rank {rank}" for rank, number in enumerate(told) if number), None)
        laps = [StepTimes(*lap) for lap in zip(*times, strict=True)]
        answers = StepStatus(self._step, losses, all(applied), any(failed), first, laps)
        for judge in self._judges:
            judge(answers)
        return answers.told


class StopAwareIterator:
    """Passes batches on until any rank is told to stop; ``told`` says whether that was so. For loops of equal length.

    Read one batch late, like ``RollCall``.

    Args:
        moved: called for each batch.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, moved: Callable[[], None]) -> None:
        self.told = False
        self._batches, self._device, self._moved = batches, device, moved

    def __iter__(self) -> Iterator[Batch]:
        votes = None
        for batch in self._batches:
            yield batch
            self._moved()
            before, votes = votes, gather_rows(torch.full([1], requested_signal(), device=self._device))
            if before is not None and before.any():
                self.told = True
                return
