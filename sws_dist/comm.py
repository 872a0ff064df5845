"""Ranks: who am I, on which device, and do we all agree.

The launcher says who a rank is (``launchers.py``); here the ranks find each other, and check that they are as many as
were asked for.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sws_dist import launchers
from sws_dist.errors import RunError

_GRACE_S = 30


@dataclass(frozen=True)
class World:
    """This rank's place."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    nodes: int

    def __str__(self) -> str:
        """How many there are: ``2 nodes x 8 ranks``."""
        if self.size == 1:
            return "1 rank"
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        even = self.size % self.nodes == 0
        return f"{nodes} x {self.size // self.nodes} rank(s)" if even else f"{self.size} ranks on {nodes}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_s: int) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and choose this rank's device and thread count.

    Args:
        timeout_s: seconds that a collective may take before it is an error.

    Raises:
        ConfigError: on every rank; the hostfile that DeepSpeed was given is not there.
        RunError: on every rank; they are fewer than hostfile or SLURM promised, or on another number of nodes.
        ValueError: this rank has no GPU.
    """
    env = os.environ
    launchers.complete(env)
    promises = list(launchers.promises())
    local_rank, local_size = int(env["LOCAL_RANK"]), int(env["LOCAL_SIZE"])
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":  # DeepSpeed's own switch
        # A launcher that shows each rank its own GPU only (srun --gpus-per-task=1) calls every one of them 0.
        index = 0 if len(os.environ.get("CUDA_VISIBLE_DEVICES", "all,of,them").split(",")) == 1 else local_rank
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
                "lower slots in the hostfile, --num_accelerators or --ntasks-per-node"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    else:
        device = torch.device("cpu")
        if (note := launchers.name_gloo_interface(env)) and local_rank == 0:
            print(note, file=sys.stderr, flush=True)
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that share a node share its cores
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))

    import deepspeed  # after the environment is complete; it reads it at import

    # On CPUs DeepSpeed would compile an operator that only its inference uses: minutes where others compile too, and
    # for ever where a killed run has left the compiler's lock behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        # Later than the watch (watch.py) of each rank, which has more to say than the backend.
        timeout=datetime.timedelta(seconds=timeout_s + _GRACE_S),
        auto_mpi_discovery=False,
        verbose=False,
    )
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, _count_nodes())
    with together("count the ranks"):
        for promise in promises:
            if promise.broken_by(world.nodes, world.size):
                raise RunError(
                    f"this run has {world.nodes} node(s) and {world.size} rank(s), but {promise.nodes} and "
                    f"{promise.ranks} were promised by {promise.by}"
                )
    return world


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank did not take part."""
    # gloo's errors have no type of their own, but the place in its sources that they come from.
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error)


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block that holds no collectives; if it fails anywhere, every rank raises the same ``RunError``.

    A rank that raised alone would leave the others waiting in their next collective.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if failure is not None:
            raise failure
        return
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None and not isinstance(failure, (ValueError, OSError, RunError)):
        raise failure  # a bug: its traceback is worth more than a tidy end
    failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
    if failed:
        rank, text = failed[0]
        everywhere = len(failed) == len(messages)
        raise RunError(text if everywhere else f"{text} (rank {rank} of {len(messages)}, while it tried to {what})")


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's value in rank order, on rank 0; None elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks; ``values`` stays as it was."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather_rows(row: Tensor) -> Tensor:
    """[n] on each rank -> [world, n] on every rank."""
    if not dist.is_initialized():
        return row[None]
    out = torch.empty(dist.get_world_size(), len(row), dtype=row.dtype, device=row.device)
    dist.all_gather(list(out), row)
    return out


def gather_scalars(value: Tensor) -> Tensor:
    """[] on each rank -> [world] on every rank."""
    return gather_rows(value.reshape(1))[:, 0]


def seed_everything(*numbers: int) -> None:
    """Seed every generator of this process as a pure function of ``numbers``.

    Called before each micro-batch with its place in the run, it makes drop-path and mixing independent of what
    ran before: a resumed run draws what the uninterrupted one drew, and no generator state needs saving.
    """
    seed = 0
    for number in numbers:  # splitmix64's finaliser: neighbours in, strangers out
        seed = (seed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 31
    torch.manual_seed(seed >> 1)
    random.seed(seed)


def _count_nodes() -> int:
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, launchers.node_name())
    return len(set(names))
