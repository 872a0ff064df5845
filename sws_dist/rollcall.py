"""What the ranks tell each other after every step, so that all of them go on or all of them stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sws_dist import comm, signals
from sws_dist.data.loader import Batch
from sws_dist.errors import RunError


class RollCall:
    """Every rank's loss, and whether it was told to stop.

    The answers are read one step late: by then they have arrived without making the device wait. All ranks read the
    same table, so they decide alike.

    Args:
        failure: why this rank's input failed, if it did; its losses are then NaN.
    """

    def __init__(self, failure: Callable[[], Exception | None]) -> None:
        self._failure, self._step = failure, 0
        self._table: Tensor | None = None

    def call(self, step: int, loss: Tensor) -> None:
        """Report for this rank that ``step`` (counted from 1) is taken, with its ``loss`` []. A collective."""
        self._step = step
        self._table = comm.gather_rows(torch.stack([loss, torch.full_like(loss, signals.asked())]))

    def read(self) -> str | None:
        """Of the latest call: which signal reached which rank, if any did.

        Raises:
            RunError: on all ranks, if a loss is not finite.
            ValueError: likewise, if a rank's input failed.
        """
        if self._table is None:
            return None
        losses, numbers = self._table.T.tolist()
        if not all(map(math.isfinite, losses)):
            self._refuse(losses)
        return next((f"{signals.name(n)} on rank {rank}" for rank, n in enumerate(numbers) if n), None)

    def _refuse(self, losses: list[float]) -> None:
        with comm.together("read the images"):
            if (failure := self._failure()) is not None:
                raise failure
        rank, loss = next((rank, loss) for rank, loss in enumerate(losses) if not math.isfinite(loss))
        raise RunError(
            f"the loss is {loss} at step {self._step} on rank {rank}; the last checkpoint is untouched. "
            "A lower optim.lr, more warm-up or gradient_clipping usually helps"
        )


class Until:
    """Passes batches on until any rank is told to stop; ``told`` says whether that was so. For loops of equal length.

    Read one batch late, like ``RollCall``.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self.told = False
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        votes = None
        for batch in self._batches:
            yield batch
            before, votes = votes, comm.gather_rows(torch.full([1], signals.asked(), device=self._device))
            if before is not None and before.any():
                self.told = True
                return
