"""Plan an expansion: choose, for each layer of a descendant, the stage that it is copied from.

Source: SWS (IJCAI 2024), section 3.3 and the one published map (12 layers: 0,0,0,1,1,1,2,2,3,3,4,4).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from sws_dist.config.schema import MAX_LAYERS

NAMED_PLANS = ("even", "proportional", "spaced")


def expansion_plan(schedule: Sequence[int], depth: int, kind: str | Sequence[int] = "even") -> tuple[int, ...]:
    """Return the expansion plan: for each of the descendant's ``depth`` layers, the stage that it is copied from.

    Args:
        schedule: repeats of each stage of the auxiliary model.
        kind: ``even`` gives each stage depth // stages layers and the remainder to the earliest stages; at the
            auxiliary's own depth it is the auxiliary's own schedule. ``proportional`` follows the schedule by
            largest remainder. ``spaced`` gives layer j stage j * stages // depth: stages at even distances, whether
            they have to be left out or repeated. A sequence is an explicit plan.

    Raises:
        ValueError: a depth that is no whole number from 1 to ``MAX_LAYERS``, or a plan of the wrong length, range or
            order.
    """
    stages = len(schedule)
    if not is_whole(depth) or not 1 <= depth <= MAX_LAYERS:
        raise ValueError(f"depth {depth!r}: a descendant has a whole number of layers, from 1 to {MAX_LAYERS}")
    if not isinstance(kind, str):
        return _check(_stage_numbers(kind), depth, stages)
    if kind == "spaced":
        return tuple(layer * stages // depth for layer in range(depth))
    if kind == "even":
        counts = list(schedule) if depth == sum(schedule) else _even(stages, depth)
    elif kind == "proportional":
        counts = _proportional(schedule, depth)
    else:
        raise ValueError(_unknown(kind))
    return tuple(stage for stage, count in enumerate(counts) for _ in range(count))


def is_whole(value: object) -> bool:
    """Return True for an integer of Python's or NumPy's, which True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _stage_numbers(plan: Any) -> tuple[int, ...]:
    stages = plan.tolist() if hasattr(plan, "tolist") else plan  # an array or a tensor
    if not isinstance(stages, Sequence) or not all(map(is_whole, stages)):
        raise ValueError(_unknown(plan))
    return tuple(map(int, stages))


def parse_plan(text: str) -> str | tuple[int, ...]:
    """Parse ``expansion_plan``'s ``kind`` from a command line: a name, or comma-separated stage numbers."""
    if text in NAMED_PLANS:
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(_unknown(text)) from None


def _unknown(plan: object) -> str:
    return f"plan {plan!r}: expected {', '.join(NAMED_PLANS)}, or stage numbers such as 0,0,1,2,3,4 (in Python a list)"


def _even(stages: int, depth: int) -> list[int]:
    share, extra = divmod(depth, stages)
    return [share + (stage < extra) for stage in range(stages)]


def _proportional(schedule: Sequence[int], depth: int) -> list[int]:
    """Share layers by largest remainder; where remainders tie, the earlier stage gets the layer."""
    exact = [depth * repeats / sum(schedule) for repeats in schedule]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda stage: (counts[stage] - exact[stage], stage))
    for stage in by_remainder[: depth - sum(counts)]:
        counts[stage] += 1
    return counts


def _check(layers: tuple[int, ...], depth: int, stages: int) -> tuple[int, ...]:
    if len(layers) != depth:
        raise ValueError(f"plan {list(layers)} has {len(layers)} layers, but the depth is {depth}")
    for layer, stage in enumerate(layers):
        if not 0 <= stage < stages:
            raise ValueError(f"plan {list(layers)}: layer {layer} takes stage {stage}; stages are 0 to {stages - 1}")
    if list(layers) != sorted(layers):
        raise ValueError(f"plan {list(layers)}: stages must not decrease from one layer to the next")
    return layers
