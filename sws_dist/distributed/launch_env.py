"""Find out what started this process, which rank it is, and how many ranks were asked for. Imports no torch.

Five ways lead here: DeepSpeed's launcher (hostfile or one node), DeepSpeed's ``--launcher slurm``, ``torchrun``, plain
``srun``, and plain ``python``, a world of one. DeepSpeed's and torchrun set RANK, WORLD_SIZE, ... for every process;
SLURM's variables are translated here, since neither torch nor DeepSpeed reads them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
import re
import socket
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sws_dist.errors import ConfigError

ANY_RANK = {"any_rank": True}
"""``extra=ANY_RANK`` lets a log record be shown by whichever rank writes it; others are shown by rank 0 alone."""
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def rank() -> int:
    """Return this process's rank, as its launcher gave it."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if _is_task(os.environ) else 0))


def local_rank() -> int:
    """Return this process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ["SLURM_LOCALID"] if _is_task(os.environ) else 0))


def complete_environment(env: MutableMapping[str, str]) -> None:
    """Set what torch and DeepSpeed read of ``env``: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and the master's address.

    Variables that are set already keep their values.
    """
    if "RANK" not in env and _is_task(env):
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_SIZE"] = str(tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # Every rank has to find the same port without asking. Below 32768, where systems begin to hand out their own.
        job, step = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", 0))
        env.setdefault("MASTER_PORT", str(10_000 + (job + 997 * step) % 20_000))
    for name, value in _ALONE.items():
        env.setdefault(name, value)
    env.setdefault("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port()) if env["WORLD_SIZE"] == "1" else "29500"


@dataclass(frozen=True)
class ExpectedWorld:
    """Describe the world that was asked for: a number of nodes with at least a number of ranks in all."""

    nodes: int
    ranks: int
    by: str
    """Names what asked for it, and says what to do where the world differs."""

    def mismatches(self, nodes: int, ranks: int) -> bool:
        return nodes != self.nodes or ranks < self.ranks


def expected_worlds() -> Iterator[ExpectedWorld]:
    """Yield the worlds that the launchers above this process were asked for.

    Raises:
        ConfigError: DeepSpeed was given a hostfile that is not there, and went on with this machine alone.
    """
    for command in _ancestors():
        if (hostfile := _hostfile(command)) and not Path(hostfile).is_file():
            raise ConfigError(
                f"--hostfile {hostfile}: there is no such file on {socket.gethostname()}, and DeepSpeed went on with "
                "this machine alone; give the path of a file with a line 'HOST slots=GPUS' for every node"
            )
        if world := _world_info(command):
            names = ", ".join(f"{host} with {len(slots)}" for host, slots in world.items())
            yield ExpectedWorld(len(world), sum(map(len, world.values())), f"DeepSpeed's launcher (its hosts: {names})")
    yield from _slurm(os.environ)


def node_name() -> str:
    """Return this node's name, unique to it: equal host names are told apart by the running kernel's boot id."""
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{name} {boot.read_text().strip()}" if boot.is_file() else name


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: ``gpu[03-05,9],login`` -> ``gpu03``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    assert found is not None, nodelist
    return f"{found[1]}{found[2] or ''}{found[3]}"


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form, node by node: ``8(x2),4`` -> ``[8, 8, 4]``."""
    return [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]  # fmt: skip


def choose_gloo_interface(env: MutableMapping[str, str]) -> str | None:
    """Set GLOO_SOCKET_IFNAME where gloo would announce an address that other nodes cannot reach.

    Gloo announces the address of the machine's own name. Where that is loopback (Debian writes ``127.0.1.1 NAME``
    into /etc/hosts) or nothing, the interface that leads to rank 0 is named instead.

    Returns:
        A message for the user; None where nothing was to be done.

    Raises:
        ConfigError: on rank 0's own node, if there is more than one to choose from.
    """
    host = socket.gethostname()
    one_node = env["LOCAL_SIZE"] == env["WORLD_SIZE"]
    if one_node or "GLOO_SOCKET_IFNAME" in env or not _address(host).startswith("127."):
        return None
    interfaces = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    own = _own_address_towards(env["MASTER_ADDR"])
    chosen = [name for name, address in interfaces.items() if address == own] or list(interfaces)
    if len(chosen) != 1:
        raise ConfigError(
            f"{host}: its name leads to loopback in /etc/hosts, which other nodes cannot reach. Set GLOO_SOCKET_IFNAME "
            f"to the interface that they can reach; there are {', '.join(f'{n} ({a})' for n, a in interfaces.items())}"
        )
    env["GLOO_SOCKET_IFNAME"] = chosen[0]
    return (
        f"{host}: its name leads to loopback in /etc/hosts, which other nodes cannot reach; gloo uses {chosen[0]} "
        f"({interfaces[chosen[0]]}). GLOO_SOCKET_IFNAME chooses another interface"
    )


def _address(host: str) -> str:
    """Resolve a host name; an unknown one gives loopback, as in gloo."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "127.0.0.1"


def _own_address_towards(host: str) -> str:
    """Return the address that a packet to ``host`` would leave with; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 1))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _is_task(env: MutableMapping[str, str]) -> bool:
    """Return True if ``srun`` started this process.

    A batch script's own commands see SLURM_PROCID too, but no node list.
    """
    return "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env


def _slurm(env: MutableMapping[str, str]) -> Iterator[ExpectedWorld]:
    if _is_task(env):
        nodes, tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
        yield ExpectedWorld(nodes, tasks, "srun (is RANK set in its environment? a rank reads it as its own)")
    elif "SLURM_JOB_NUM_NODES" in env:
        nodes = int(env["SLURM_JOB_NUM_NODES"])
        # Below a launcher with one task a node, SLURM's number of tasks says nothing about ranks.
        tasks = int(env.get("SLURM_NTASKS", nodes)) if env["WORLD_SIZE"] == "1" else nodes
        yield ExpectedWorld(nodes, tasks, f"SLURM, to job {env['SLURM_JOB_ID']} (put srun before the command)")


def _ancestors() -> Iterator[list[str]]:
    """Yield the command lines of the processes above this one, as far as they may be read."""
    try:
        for process in psutil.Process().parents():
            yield process.cmdline()
    except psutil.Error:
        return


def _hostfile(command: list[str]) -> str | None:
    """Return the hostfile that a ``deepspeed`` command names, if any."""
    for place, word in enumerate(command[:4]):
        if Path(word).name in ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"):
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("-H", "--hostfile")
            return parser.parse_known_args(command[place + 1 :])[0].hostfile
    return None


def _world_info(command: list[str]) -> dict[str, list[int]] | None:
    """Return host -> slots, as DeepSpeed's launcher gives them to its helper on every node."""
    for word in command:
        if word.startswith("--world_info="):
            try:
                return json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
            except (binascii.Error, ValueError):
                return None
    return None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
