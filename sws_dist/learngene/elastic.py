"""Draw the depth of each training step, so that an auxiliary model becomes a network of any depth.

In each step the stages repeat as the expansion plan of the drawn depth says. The auxiliary model at that depth computes
exactly what the descendant of that depth computes, so a descendant is trained before it is expanded.

Supernets are trained this way: slimmable networks draw widths (Yu and Huang, ICCV 2019), LayerDrop leaves layers out
(Fan et al., ICLR 2020). Here the depth is drawn, and the layers that come and go share their weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sws_dist.config.schema import ElasticConfig
from sws_dist.learngene.plan import expansion_plan

_STREAM = 0x5357_5344  # keeps these draws apart from others that are seeded with (seed, step)


@dataclass(frozen=True)
class ElasticDepth:
    """The depth of every step: a function of the seed and the step's number alone.

    So all ranks and micro-batches of a step run the same layers, and a resumed run draws what an undisturbed one draws.

    Args:
        schedule: the auxiliary model's own repeats.
        steps_per_epoch: may be a fraction; epochs do not have to end with a step.

    Raises:
        ValueError: a depth at which some stage would not run, or ``start_epoch`` with an own depth that is not drawn.
    """

    config: ElasticConfig
    schedule: tuple[int, ...]
    seed: int
    steps_per_epoch: float

    def __post_init__(self) -> None:
        own = sum(self.schedule)
        if self.config.start_epoch and own not in self.depths:
            raise ValueError(
                f"model.elastic.start_epoch {self.config.start_epoch:g}: the model has {own} layers of its own, which "
                f"lies outside min_depth {self.depths[0]} to max_depth {self.depths[-1]}; include it, or set 0"
            )
        for depth in self.depths:
            if min(self.repeats(depth)) < 1:
                raise ValueError(
                    f"model.elastic: at depth {depth} the {self.config.plan} plan gives the {len(self.schedule)} "
                    f"stages {list(self.repeats(depth))} layers; raise min_depth until each has one"
                )

    @property
    def depths(self) -> range:
        """The depths that are drawn."""
        return range(self.config.min_depth, self.config.max_depth + 1)

    def repeats(self, depth: int) -> tuple[int, ...]:
        """Return how often each stage runs in a descendant of ``depth`` layers."""
        return stage_repeats(self.schedule, depth, self.config.plan)

    def draw(self, step: int) -> int:
        """Return the depth of the update that takes the weights from ``step`` to ``step + 1``."""
        if step < round(self.config.start_epoch * self.steps_per_epoch):
            return sum(self.schedule)
        if self.config.rule == "sandwich" and step % 3 != 2:
            return self.depths[0] if step % 3 == 0 else self.depths[-1]
        return int(np.random.default_rng((_STREAM, self.seed, step)).integers(self.depths[0], self.depths[-1] + 1))

    def count_steps(self, total_steps: int) -> Counter[int]:
        """Return how many of the first ``total_steps`` steps are taken at each depth."""
        return Counter(self.draw(step) for step in range(total_steps))


def stage_repeats(schedule: Sequence[int], depth: int, plan: str | Sequence[int] = "even") -> tuple[int, ...]:
    """Return how many of a descendant's layers are copied from each stage. Raises what ``expansion_plan`` raises."""
    layers = Counter(expansion_plan(schedule, depth, plan))
    return tuple(layers[stage] for stage in range(len(schedule)))
