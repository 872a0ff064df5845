"""An exponential moving average of sharded weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sws_dist.zero.engine import sync_model_from_masters
from sws_dist.zero.partition import master_weights


class ShardedEMA:
    """Exponential moving average of the masters, on each rank for its own shard: no traffic, no whole copy.

    Built after every weight is in place (learngene, initial checkpoint), so it starts from them. ``average`` is laid
    out like the masters.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.average = [master.clone() for master in master_weights(engine)]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.average, master_weights(self.engine), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the average. A collective at both ends."""
        trained = [master.clone() for master in master_weights(self.engine)]
        self._put(self.average)
        yield
        self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for master, value in zip(master_weights(self.engine), values, strict=True):
            master.copy_(value)
        sync_model_from_masters(self.engine)
