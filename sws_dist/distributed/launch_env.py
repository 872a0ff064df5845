"""Find out what started this process, which rank it is, and how many ranks were asked for. Imports no torch.

Five ways lead here: DeepSpeed's launcher (hostfile or one node), DeepSpeed's ``--launcher slurm``, ``torchrun``, plain
``srun``, and plain ``python``, a world of one. DeepSpeed's and torchrun set RANK, WORLD_SIZE, ... for every process;
SLURM's variables are translated here, since neither torch nor DeepSpeed reads them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import errno
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sws_dist.errors import ConfigError

ANY_RANK = {"any_rank": True}
"""``extra=ANY_RANK`` lets a log record be shown by whichever rank writes it; others are shown by rank 0 alone."""
_INTERACTIVE_STEPS = ("interactive", str(2**32 - 6))
"""SLURM's name of the step in which ``salloc`` opens a shell."""
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def rank() -> int:
    """Return this process's rank, as its launcher gave it."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if _is_task(os.environ) else 0))


def local_rank() -> int:
    """Return this process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ["SLURM_LOCALID"] if _is_task(os.environ) else 0))


def forget_ranks(env: MutableMapping[str, str]) -> None:
    """Remove what a launcher, or a line in a shell's profile, says of ranks: for commands that are one process."""
    for name in _RANK_VARIABLES:
        env.pop(name, None)


def complete_environment(env: MutableMapping[str, str]) -> None:
    """Set what torch and DeepSpeed read of ``env``: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and the master's address.

    Variables that are set already keep their values.

    Raises:
        ConfigError: there are several ranks, and which one this is, or how many there are, is not said.
    """
    if "RANK" not in env and _is_task(env):
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_SIZE"] = str(tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # Every rank has to find the same port without asking. Below 32768, where systems begin to hand out their own.
        job, step = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", 0))
        env.setdefault("MASTER_PORT", str(10_000 + (job + 997 * step) % 20_000))
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        given, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        if env[given] != _ALONE[given]:  # this process would wait for others that nobody has started
            raise ConfigError(
                f"the environment has {given}={env[given]}, but no {missing}: unset {given} for a single process; "
                "deepspeed, torchrun and srun set both for several"
            )
    for name, value in _ALONE.items():
        env.setdefault(name, value)
    env.setdefault("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port()) if env["WORLD_SIZE"] == "1" else "29500"


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
    """Return the first host of a SLURM node list, which is node 0: ``rack[1-2]n[03-05,9]-ib,login`` -> ``rack1n03-ib``.

    Raises:
        ConfigError: no node list.
    """
    found = re.match(r"[,\s]*((?:[^,\s\[\]]|\[\d[\d,/:-]*\])+)(?:[,\s]|$)", nodelist)
    if found is None:
        raise ConfigError(f"{nodelist!r}: not a SLURM node list; expected names such as gpu[03-05],login")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[1])


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form, node by node: ``8(x2),4`` -> ``[8, 8, 4]``."""
    return [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]  # fmt: skip


def free_port() -> int:
    """Return a TCP port of this machine that nothing uses at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def require_free_port(env: Mapping[str, str]) -> None:
    """Check, on rank 0, that the ranks can meet at MASTER_PORT. torch would print warnings and a traceback.

    Raises:
        OSError: another program listens there, or nothing may.
        ConfigError: no port number.
    """
    if env["RANK"] != "0" or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens already
        return
    text, host = env["MASTER_PORT"], socket.gethostname()
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT={text}: expected a port number from 1 to 65535")
    is_dual = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if is_dual else (socket.AF_INET, "")
    try:
        socket.create_server((address, int(text)), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # no IPv6, for example; torch knows more ways
        raise OSError(
            f"port {text} of {host}, where the ranks are to meet: {os.strerror(error.errno)}; choose another with "
            "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N (a single process needs none)"
        ) from None


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


def _is_task(env: Mapping[str, str]) -> bool:
    """Return True if ``srun`` started this process.

    A batch script's own commands see SLURM_PROCID too, but no node list.
    """
    return "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and not _is_interactive(env)


def _is_interactive(env: Mapping[str, str]) -> bool:
    """Return True in the shell of ``salloc``, on the node where it was called or on the allocation's first node."""
    return "SLURM_PROCID" not in env or env.get("SLURM_STEP_ID") in _INTERACTIVE_STEPS


def _slurm(env: Mapping[str, str]) -> Iterator[ExpectedWorld]:
    if _is_task(env):
        nodes, tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
        yield ExpectedWorld(nodes, tasks, "srun (is RANK set in its environment? a rank reads it as its own)")
    elif "SLURM_JOB_NUM_NODES" in env and not _is_interactive(env):
        nodes = int(env["SLURM_JOB_NUM_NODES"])
        # Below a launcher with one task a node, SLURM's number of tasks says nothing about ranks.
        tasks = int(env.get("SLURM_NTASKS", nodes)) if env["WORLD_SIZE"] == "1" else nodes
        yield ExpectedWorld(nodes, tasks, f"SLURM, to job {env['SLURM_JOB_ID']} (put srun before the command)")


def describe_unused_tasks(env: Mapping[str, str], nodes: int, ranks: int) -> str | None:
    """Return a message if a run in an interactive allocation uses less of it than there is, else None.

    A batch script that does so is refused (``expected_worlds``); here trying a command on one rank is what people do.
    """
    if "SLURM_JOB_ID" not in env or not _is_interactive(env):
        return None
    given_nodes = int(env.get("SLURM_JOB_NUM_NODES", 1))
    tasks = int(env.get("SLURM_NTASKS", given_nodes))
    if nodes >= given_nodes and ranks >= tasks:
        return None
    return (
        f"job {env['SLURM_JOB_ID']} has {given_nodes} node(s) and {tasks} task(s), this run uses {nodes} and {ranks}; "
        "srun before the command starts a rank for every task"
    )


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
