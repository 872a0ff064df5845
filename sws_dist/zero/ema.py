"""Average sharded weights over the steps (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sws_dist.zero.engine import sync_model_from_masters
from sws_dist.zero.partition import master_weights
from sws_dist.zero.protocol import ZeroEngine


class ShardedEMA:
    """Keep an exponential moving average of the masters, on each rank for its own shard: no traffic, no whole copy.

    Built after every weight is in place (learngene, initial checkpoint), it starts from them. ``average`` is laid out
    like the masters.

    Args:
        decay: the largest factor of the average in a step. In step t, from 0, it is (1 + t) / (10 + t) where that is
            less, or a run of few steps would end with an average of mostly its initial weights (source: TensorFlow's
            ``ExponentialMovingAverage`` with ``num_updates``).
    """

    def __init__(self, engine: ZeroEngine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.average = [master.clone() for master in master_weights(engine)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the masters, which step number ``step``, from 0, has updated."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, master_weights(self.engine), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the average inside the block, and the trained weights again after it. A collective.

        After an exception on several ranks, only this rank's masters are put back: the others may not be there to
        exchange weights with.
        """
        trained = [master.clone() for master in master_weights(self.engine)]
        self._copy_to_masters(self.average)
        sync_model_from_masters(self.engine)
        try:
            yield
        except Exception:
            self._copy_to_masters(trained)
            if dist.get_world_size() == 1 or self.engine.zero_optimization_stage() == 0:  # no collective
                sync_model_from_masters(self.engine)
            raise
        self._copy_to_masters(trained)
        sync_model_from_masters(self.engine)

    @torch.no_grad()
    def _copy_to_masters(self, values: list[Tensor]) -> None:
        for master, value in zip(master_weights(self.engine), values, strict=True):
            master.copy_(value)
