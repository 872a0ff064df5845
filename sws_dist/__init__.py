"""Train one vision transformer with shared stages, and expand it into a family of them.

    >>> import sws_dist
    >>> learngene = sws_dist.load_learngene("runs/auxiliary_small/learngene.safetensors")  # doctest: +SKIP
    >>> model = sws_dist.expand(learngene, depth=9)  # doctest: +SKIP

The names below are the public interface; everything else may change between versions. Each is imported when it is
first used: torch takes seconds, and ``import sws_dist`` alone should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sws_dist.api import evaluate, evaluate_depths, expand, train
    from sws_dist.config.loader import load_config
    from sws_dist.config.schema import RunConfig
    from sws_dist.learngene.file import Learngene, load_learngene
    from sws_dist.models.vit import create_model
    from sws_dist.scoring import Scores

__version__ = "0.1.0"

__all__ = [
    "Learngene",
    "RunConfig",
    "Scores",
    "__version__",
    "create_model",
    "evaluate",
    "evaluate_depths",
    "expand",
    "load_config",
    "load_learngene",
    "train",
]

_HOMES = {
    "Learngene": "sws_dist.learngene.file",
    "RunConfig": "sws_dist.config.schema",
    "Scores": "sws_dist.scoring",
    "create_model": "sws_dist.models.vit",
    "evaluate": "sws_dist.api",
    "evaluate_depths": "sws_dist.api",
    "expand": "sws_dist.api",
    "load_config": "sws_dist.config.loader",
    "load_learngene": "sws_dist.learngene.file",
    "train": "sws_dist.api",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        """Import a public name from its home."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
