"""Let the ranks of a run find each other, and check that they are as many as were asked for.

The launcher tells each process its rank (``launch_env.py``); this module joins the process group and picks the device.
"""

from __future__ import annotations

import datetime
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sws_dist.distributed.collectives import raise_on_all_ranks
from sws_dist.distributed.launch_env import (
    ANY_RANK,
    choose_gloo_interface,
    complete_environment,
    describe_unused_tasks,
    expected_worlds,
    node_name,
    require_free_port,
)
from sws_dist.errors import RunError

_GRACE_S = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """Describe this rank's place: its rank, its device, and how many ranks and nodes there are."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    nodes: int

    def __str__(self) -> str:
        """Return how many ranks there are: ``2 nodes x 8 ranks``."""
        if self.size == 1:
            return "1 rank"
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        even = self.size % self.nodes == 0
        return f"{nodes} x {self.size // self.nodes} rank(s)" if even else f"{self.size} ranks on {nodes}"

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def init_distributed(timeout_s: int) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and choose this rank's device and thread count.

    A group that this process has joined already is kept, with its own timeout.

    Args:
        timeout_s: seconds that a collective may take before it is an error.

    Raises:
        ConfigError: on every rank; the hostfile that DeepSpeed was given is not there.
        RunError: on every rank; they are fewer than hostfile or SLURM asked for, or on another number of nodes.
        OSError: the port where the ranks are to meet is in use, or they did not find each other there.
        ValueError: this rank has no GPU, or PyTorch cannot use those that its machine has.
    """
    env = os.environ
    complete_environment(env)
    expected = list(expected_worlds())
    local_rank = int(env["LOCAL_RANK"])
    device = _choose_device(local_rank)
    if device.type == "cpu" and (note := choose_gloo_interface(env)) and local_rank == 0:
        log.warning(note, extra=ANY_RANK)
    if not dist.is_initialized():
        require_free_port(env)
        _join_process_group(device, timeout_s)
    nodes, sharing = _count_nodes_and_sharing()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in env:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // sharing))
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, nodes)
    with raise_on_all_ranks("count the ranks"):
        for each in expected:
            if each.mismatches(world.nodes, world.size):
                raise RunError(
                    f"this run has {world.nodes} node(s) and {world.size} rank(s), but {each.nodes} and "
                    f"{each.ranks} were promised by {each.by}"
                )
    if (note := describe_unused_tasks(env, world.nodes, world.size)) is not None:
        log.warning(note)
    return world


def _join_process_group(device: torch.device, timeout_s: int) -> None:
    env = os.environ
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # Longer than the heartbeat's own limit (heartbeat.py), which has more to say than the backend.
            timeout=datetime.timedelta(seconds=timeout_s + _GRACE_S),
            # Binding the device lets NCCL connect at once; a single rank has no peer to connect to.
            device_id=device if device.type == "cuda" and env["WORLD_SIZE"] != "1" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"rank {env['RANK']} of {env['WORLD_SIZE']} did not meet the others at {env['MASTER_ADDR']}, port "
            f"{env['MASTER_PORT']} ({reason})"
        ) from None


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def has_gpu() -> bool:
    """Return whether to compute on a GPU: there is one, and DeepSpeed's switch DS_ACCELERATOR does not say cpu.

    A warning says where PyTorch cannot use the GPUs that are there.
    """
    if (problem := describe_unusable_gpus()) is not None:
        log.warning(problem, extra=ANY_RANK)
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def describe_unusable_gpus() -> str | None:
    """Return why PyTorch cannot use the NVIDIA GPUs of this machine; None where it can, or nobody wants it to."""
    env = os.environ
    if env.get("DS_ACCELERATOR") == "cpu" or env.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or torch.cuda.is_available():
        return None
    # SLURM counts what it gave to the job; a driver makes a file for each GPU.
    count = env.get("SLURM_GPUS_ON_NODE") or str(len(list(Path("/dev").glob("nvidia[0-9]*"))))
    if count == "0":
        return None
    try:
        torch.cuda.init()
        reason = "the job has asked for none"  # its control group hides them
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, or a PyTorch without CUDA
        reason = str(error).strip().splitlines()[0]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return (
        f"{node_name()} has {count} NVIDIA GPU(s), but PyTorch {torch.__version__} (built with {built}) cannot use "
        f"them: {reason}. DS_ACCELERATOR=cpu computes on the CPU"
    )


def _choose_device(local_rank: int) -> torch.device:
    if (problem := describe_unusable_gpus()) is not None:  # or a run would take weeks on CPUs
        raise ValueError(problem)
    if not has_gpu():
        return torch.device("cpu")
    # A launcher that shows each rank its own GPU only (srun --gpus-per-task=1) calls every one of them 0.
    index = 0 if len(os.environ.get("CUDA_VISIBLE_DEVICES", "all,of,them").split(",")) == 1 else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "lower slots in the hostfile, --num_accelerators or --ntasks-per-node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _count_nodes_and_sharing() -> tuple[int, int]:
    """Return the number of nodes, and of ranks that share cores with this one, itself included. A collective.

    Some launchers bind each rank to cores of its own (srun, deepspeed --bind_cores_to_rank), others let the ranks of a
    node share all of them.
    """
    own = (node_name(), os.sched_getaffinity(0))
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    sharing = sum(node == own[0] and not cores.isdisjoint(own[1]) for node, cores in ranks)
    return len({node for node, _ in ranks}), sharing
