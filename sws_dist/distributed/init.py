"""Ranks: who am I, on which device, and do we all agree.

The launcher says who a rank is (``launchers.py``); here the ranks find each other, and check that they are as many as
were asked for.
"""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sws_dist.distributed.collectives import raise_on_all_ranks
from sws_dist.distributed.launch_env import choose_gloo_interface, complete_environment, expected_worlds, node_name
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


def init_distributed(timeout_s: int) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and choose this rank's device and thread count.

    Args:
        timeout_s: seconds that a collective may take before it is an error.

    Raises:
        ConfigError: on every rank; the hostfile that DeepSpeed was given is not there.
        RunError: on every rank; they are fewer than hostfile or SLURM promised, or on another number of nodes.
        ValueError: this rank has no GPU.
    """
    env = os.environ
    complete_environment(env)
    promises = list(expected_worlds())
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
        if (note := choose_gloo_interface(env)) and local_rank == 0:
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
    with raise_on_all_ranks("count the ranks"):
        for promise in promises:
            if promise.broken_by(world.nodes, world.size):
                raise RunError(
                    f"this run has {world.nodes} node(s) and {world.size} rank(s), but {promise.nodes} and "
                    f"{promise.ranks} were promised by {promise.by}"
                )
    return world


def close_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _count_nodes() -> int:
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, node_name())
    return len(set(names))
