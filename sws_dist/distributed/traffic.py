"""Count the calls and bytes of this process's collectives, for tests and benchmarks.

The counters stand at torch's process groups, so everything above them is counted alike: torch.distributed, DeepSpeed,
objects that are pickled for the way. What counts as bytes is the whole tensor that a collective spreads or combines,
once, as this rank sees it: a broadcast's tensor, the gathered result of an all-gather, the input of an all-reduce or a
reduce-scatter. How a backend routes them (rings, trees) multiplies all of them much alike and is not in the figures.

    with count_traffic() as traffic:
        ...
    print(traffic)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from sws_dist.units import format_bytes

# Method of torch's ProcessGroup -> kind of collective, and which positional argument holds the whole tensor.
METHODS = {
    "broadcast": ("broadcast", 0),
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "gather": ("gather", 0),
    "scatter": ("scatter", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
}


@dataclass
class Traffic:
    """Calls and bytes by kind of collective. Barriers move nothing and are not counted."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        parts = [f"{self.calls[kind]} {kind} of {format_bytes(self.bytes[kind])}" for kind in sorted(self.calls)]
        return ", ".join(parts) or "nothing"


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process gives to its process groups inside the block, on whatever path. Blocks may nest."""
    traffic = Traffic()
    originals = {name: method for name, method in vars(ProcessGroup).items() if name in METHODS}
    for name in originals:
        setattr(ProcessGroup, name, _counting(getattr(ProcessGroup, name), *METHODS[name], traffic))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _counting(original: Callable[..., Any], kind: str, argument: int, traffic: Traffic) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args[1:], *kwargs.values()]  # without the group itself
        traffic.calls[kind] += 1
        traffic.bytes[kind] += _num_bytes(given[argument])
        return original(*args, **kwargs)

    return call


def _num_bytes(value: Any) -> int:
    """Add up the bytes of a tensor, or of all tensors of nested lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(item) for item in value)
