"""Compare what a family costs: one auxiliary model and its descendants, or each model trained from random weights.

The paper counts epochs and stored parameters; here operations are counted as well, since an epoch of a deep model, or
one with a teacher, costs more than one of a shallow model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sws_dist.models.flops import TRAIN_FACTOR

PAPER = {"total training": 6.6, "stored parameters": 20.0, "pre-training": 10.0}
"""The ratios of the paper's abstract (arXiv 2404.16897): from random weights to the method, for ten descendants."""


@dataclass(frozen=True)
class Costs:
    """What a bill is added up from. Operations are those of one forward pass over one image."""

    auxiliary: float
    """The auxiliary model's, as it trains: the mean over its depths where they are drawn."""
    own: float
    """A model's of ``own_depth`` layers."""
    own_depth: int
    layer: float
    """One layer's."""
    teacher: float
    parameters: int
    """Of the learngene, which has ``stages`` distinct layers."""
    stages: int
    layer_parameters: int

    def flops(self, depth: int) -> float:
        """Return the operations of a descendant of ``depth`` layers."""
        return self.own + (depth - self.own_depth) * self.layer

    def num_parameters(self, depth: int) -> int:
        """Return the number of parameters of a descendant of ``depth`` layers."""
        return self.parameters + (depth - self.stages) * self.layer_parameters


@dataclass(frozen=True)
class Budget:
    """Epochs over ``images`` training images, of each kind of run."""

    images: int
    auxiliary: int
    tuned: int
    """Fine-tuning of each descendant."""
    scratch: int
    """Training of each model from random weights."""
    teacher: int = 0
    """Training of the teacher on the same data; 0 if it is there already."""


@dataclass(frozen=True)
class Bill:
    """Operations of a whole family, by what they are for, and what it stores."""

    depths: tuple[int, ...]
    budget: Budget
    teacher_training: float
    auxiliary: float
    teaching: float
    """The teacher's forward passes while the auxiliary model is trained."""
    tuning: float
    scratch: float
    stored: int
    """Parameters of the learngene."""
    stored_each: int
    """Parameters of all descendants together."""

    @property
    def learngene(self) -> float:
        """Operations until the learngene is there: all that untuned descendants cost."""
        return self.teacher_training + self.auxiliary + self.teaching

    @property
    def as_published(self) -> float:
        """Operations with each descendant fine-tuned."""
        return self.learngene + self.tuning

    def ratios(self) -> dict[str, float]:
        """Return what the method saves in operations and parameters, by the names of ``PAPER`` and one more."""
        return {
            "total training": self.scratch / self.as_published,
            "total training, untuned": self.scratch / self.learngene,
            "stored parameters": self.stored_each / self.stored,
            "pre-training": self.scratch / self.learngene,
        }

    def epoch_ratios(self) -> dict[str, float]:
        """Return the same in epochs, as the paper counts them."""
        n, budget = len(self.depths), self.budget
        learngene = budget.teacher + budget.auxiliary
        return {
            "total training": n * budget.scratch / (learngene + n * budget.tuned),
            "total training, untuned": n * budget.scratch / learngene,
            "stored parameters": self.stored_each / self.stored,
            "pre-training": n * budget.scratch / learngene,
        }


def add_up(costs: Costs, depths: Sequence[int], budget: Budget) -> Bill:
    """Add up the bill of the descendants of ``depths`` layers."""
    family = sum(costs.flops(depth) for depth in depths)
    return Bill(
        depths=tuple(depths),
        budget=budget,
        teacher_training=TRAIN_FACTOR * costs.teacher * budget.teacher * budget.images,
        auxiliary=TRAIN_FACTOR * costs.auxiliary * budget.auxiliary * budget.images,
        teaching=costs.teacher * budget.auxiliary * budget.images,
        tuning=TRAIN_FACTOR * family * budget.tuned * budget.images,
        scratch=TRAIN_FACTOR * family * budget.scratch * budget.images,
        stored=costs.parameters,
        stored_each=sum(costs.num_parameters(depth) for depth in depths),
    )
