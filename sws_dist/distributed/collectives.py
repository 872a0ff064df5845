"""Exchange values between ranks, and fail on all of them together.

Every function here is a collective: all ranks must call it. Without a process group, a process is its own rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sws_dist.errors import RunError


@contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """Run a block that holds no collectives; if it fails on any rank, every rank raises the same ``RunError``.

    A rank that raised alone would leave the others waiting in their next collective.

    Args:
        what: what the block does, for the message: ``read the learngene``.

    Raises:
        RunError: the block raised a ``ValueError``, ``OSError`` or ``RunError`` on some rank. On one rank alone the
            error itself is raised.
        Exception: any other error of this rank is a bug: its traceback is worth more than a tidy end.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if _is_alone():
        if failure is not None:
            raise failure
        return
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None and not isinstance(failure, (ValueError, OSError, RunError)):
        raise failure
    failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
    if failed:
        rank, text = failed[0]
        everywhere = len(failed) == len(messages)
        raise RunError(text if everywhere else f"{text} (rank {rank} of {len(messages)}, while it tried to {what})")


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank; it is pickled for the way."""
    if _is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_on_rank0(value: Any) -> list[Any] | None:
    """Return every rank's ``value`` in rank order on rank 0, and None elsewhere; values are pickled for the way."""
    if _is_alone():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all ranks; ``values`` stays as it was."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather_rows(row: Tensor) -> Tensor:
    """Gather [n] of each rank into [world, n] on every rank."""
    if not dist.is_initialized():
        return row[None]
    out = torch.empty(dist.get_world_size(), len(row), dtype=row.dtype, device=row.device)
    dist.all_gather(list(out), row)
    return out


def gather_scalars(value: Tensor) -> Tensor:
    """Gather [] of each rank into [world] on every rank."""
    return gather_rows(value.reshape(1))[:, 0]


def average_buffers(model: nn.Module) -> None:
    """Make running statistics (batch norm), which each rank keeps for itself, equal on all ranks."""
    if _is_alone():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
