"""Exchange the ranks' status after every step, so that all ranks go on or all of them stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sws_dist.distributed.collectives import gather_rows
from sws_dist.distributed.signals import requested_signal, signal_name
from sws_dist.distributed.step_timer import StepTimes

T = TypeVar("T")


class StepStatus(NamedTuple):
    """Status of every rank after one step; lists are indexed by rank."""

    step: int
    """Number of the step, counted from 1."""
    losses: list[float]
    """Loss of each rank."""
    applied: bool
    """True if the weights were updated; this is the same on all ranks."""
    failed: bool
    """True if any rank cannot go on."""
    writing: bool
    """True while any rank is writing its part of a checkpoint."""
    stop_requested: str | None
    """Names the signal and the rank that it reached, if one was told to stop."""
    times: list[StepTimes]
    """Times of the step on each rank."""


class StepSync:
    """Gather the status of all ranks without making the device wait.

    A step's status is collected while the next step runs; by then it has arrived. All ranks read the same table, so
    they decide alike.

    Args:
        callbacks: each is called with every ``StepStatus`` on all ranks, and may raise on all of them.
    """

    def __init__(self, callbacks: Sequence[Callable[[StepStatus], None]]) -> None:
        self._callbacks = callbacks
        self._step, self._table, self._pending = 0, torch.empty(0), False

    def post(self, step: int, loss: Tensor, times: StepTimes, *, applied: bool, failed: bool, writing: bool) -> None:
        """Send this rank's status of ``step``. A collective.

        Args:
            loss: [] on the device of the process group.
            applied, failed, writing: see ``StepStatus``.
        """
        own = torch.tensor([applied, failed, writing, requested_signal(), *times], dtype=loss.dtype)
        row = torch.cat([loss.reshape(1), own.to(loss.device, non_blocking=True)])
        self._step, self._table, self._pending = step, gather_rows(row), True

    def collect(self) -> str | None:
        """Pass the latest posted status to the callbacks, once. Returns its ``stop_requested``."""
        if not self._pending:
            return None
        self._pending = False
        losses, applied, failed, writing, signals, *times = self._table.T.tolist()
        first = next((f"{signal_name(number)} on rank {rank}" for rank, number in enumerate(signals) if number), None)
        rank_times = [StepTimes(*row) for row in zip(*times, strict=True)]
        status = StepStatus(self._step, losses, all(applied), any(failed), any(writing), first, rank_times)
        for callback in self._callbacks:
            callback(status)
        return status.stop_requested


class StopAwareIterator(Generic[T]):
    """Iterate ``items`` until any rank is told to stop; ``stop_requested`` then says so.

    The iterators of all ranks must be equally long. The ranks' votes are read one item late, as in ``StepSync``.

    Args:
        device: where the votes are gathered.
        on_item: called after each item.
    """

    def __init__(self, items: Iterable[T], device: torch.device, on_item: Callable[[], None]) -> None:
        self.stop_requested = False
        self._items, self._device, self._on_item = items, device, on_item

    def __iter__(self) -> Iterator[T]:
        votes = None
        for item in self._items:
            yield item
            self._on_item()
            previous, votes = votes, gather_rows(torch.full([1], requested_signal(), device=self._device))
            if previous is not None and previous.any():
                self.stop_requested = True
                return
