"""Run code in real ranks that start in a fraction of a second.

A rank needs some seconds to start, nearly all of them to import torch, DeepSpeed and DALI. Here a server process (the
``forkserver`` of ``multiprocessing``, one for each pytest process) imports them once, and every rank is a fork of it:
a process of its own, which signals may hit and which may end as it likes. No rank is used twice, so nothing that one
test leaves behind (random state, environment, patches, process groups, DeepSpeed's globals) can reach another.

    def total(number):                                   # a module's function: ranks import it by its name
        comm.init(60)
        return int(comm.sum_over_ranks(torch.tensor(number)))

    assert ranks.run(total, 5, world=3) == [15, 15, 15]  # results in the order of the ranks

``run`` raises ``RanksFailed`` with every rank's traceback and everything they printed, ``outcomes`` returns what
became of each rank, and ``script`` runs a Python script as several ranks of a launcher would. ``start`` and
``start_script`` are for tests that disturb ranks under way. Whoever is still there at the end of a call is killed.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 600.0
"""After so long a group is stuck: far more than any test takes on a busy machine."""
GRACE_S = 60.0
"""Seconds that other ranks may go on after one has failed. They end at once where they wait for it."""

# The server sees the environment as it was before any test changed it, with this:
_SERVER_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.preload"])


class RanksFailed(AssertionError):
    """At least one rank has raised, died or been killed; the message says which, where, and what they printed."""


@dataclass(frozen=True)
class Outcome:
    """The end of one rank: a value, an error, or neither, when it was killed or left on its own."""

    value: Any
    error: BaseException | None
    traceback: str
    """The traceback of ``error``; else a sentence on how the process ended."""
    exitcode: int
    """Negative for a signal, as in ``subprocess``."""

    @property
    def ok(self) -> bool:
        return not self.traceback


def run(
    body: Callable[..., Any], *args: Any, world: int = 2, timeout_s: float = LIMIT_S, grace_s: float = GRACE_S
) -> list[Any]:
    """Call ``body(*args)`` in ``world`` ranks and return their values, in the order of the ranks.

    Raises:
        RanksFailed: not every rank has returned.
    """
    ended, printed = _run(body, args, world, timeout_s, grace_s)
    if all(outcome.ok for outcome in ended):
        return [outcome.value for outcome in ended]
    failures = [f"rank {rank} of {world}: {o.traceback}" for rank, o in enumerate(ended) if not o.ok]
    raise RanksFailed("\n".join([*failures, "---- printed by the ranks ----", printed[-6000:]]))


def outcomes(
    body: Callable[..., Any], *args: Any, world: int = 2, timeout_s: float = LIMIT_S, grace_s: float = GRACE_S
) -> tuple[list[Outcome], str]:
    """Call ``body(*args)`` in ``world`` ranks; return how each of them ended, and what they printed."""
    return _run(body, args, world, timeout_s, grace_s)


def script(
    path: str | Path,
    *arguments: str | Path,
    world: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = LIMIT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository to its end, as ``python`` does or, for several ranks, as DeepSpeed's launcher.

    Unlike the launcher this ends no rank because another one has failed: they have to do that themselves.

    Returns:
        What all ranks printed, and the first exit code that is not zero.

    Raises:
        RanksFailed: a rank was still running after ``timeout_s``.
    """
    with start_script(path, *arguments, world=world, environment=environment) as group:
        codes = group.wait(timeout_s)
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess([str(path), *map(str, arguments)], code, group.printed())


class Group:
    """Ranks under way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[BaseProcess] = []

    def _add(self, setting: _Setting, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        process = _context.Process(target=_enter, args=(setting, target, args), name=f"rank {setting.rank}")
        process.start()
        self._processes.append(process)

    @cached_property
    def processes(self) -> list[psutil.Process]:
        """The ranks, in their order. Ask for the first time while all are there."""
        return [psutil.Process(process.pid) for process in self._processes]

    def printed(self) -> str:
        """Return everything that the ranks have printed so far."""
        return (self._folder / "printed").read_text()

    def exitcodes(self) -> list[int | None]:
        """Return the exit code of every rank, None for those that are still running."""
        return [process.exitcode for process in self._processes]

    def wait(self, timeout_s: float = LIMIT_S) -> list[int]:
        """Wait for all ranks to end by themselves, and return their exit codes.

        Raises:
            RanksFailed: some were still running after ``timeout_s``; they have been killed.
        """
        if running := self._wait(timeout_s):
            self.kill(explain=True)
            raise RanksFailed(f"ranks {running} were still running after {timeout_s:g} s\n{self.printed()[-10_000:]}")
        return [process.exitcode or 0 for process in self._processes]

    def kill(self, *, explain: bool = False) -> None:
        """End all ranks and what they have started; ``explain`` has them print first where they are."""
        for process in self._processes:
            if explain and process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR2)
        if explain:
            self._wait(2.0)  # nothing says when a stack has been printed, and a stopped rank prints none
        for process in self._processes:
            if process.is_alive():
                process.kill()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()

    def _wait(self, timeout_s: float, *, until_one_fails: bool = False) -> list[int]:
        """Wait until all have ended, for ``timeout_s`` at most, and return the ranks that have not."""
        deadline = time.monotonic() + timeout_s
        while True:
            running = [rank for rank, process in enumerate(self._processes) if process.exitcode is None]
            left = deadline - time.monotonic()
            if not running or left <= 0 or (until_one_fails and any(p.exitcode for p in self._processes)):
                return running
            connection.wait([self._processes[rank].sentinel for rank in running], left)


@contextmanager
def start_script(
    path: str | Path, *arguments: str | Path, world: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Group]:
    """Start a script as ``script`` does; ranks that remain at the end of the block are killed.

    Args:
        environment: variables to set in addition to those that this process has now.
    """
    with _start(_script, (path, *map(str, arguments)), world, environment) as group:
        yield group


@contextmanager
def start(body: Callable[..., Any], *args: Any, world: int = 2) -> Iterator[Group]:
    """Start ``body(*args)`` in every rank; those that remain at the end of the block are killed."""
    with _start(_body, (body, *args), world) as group:
        yield group


@contextmanager
def _start(
    target: Callable[..., None], args: tuple[Any, ...], world: int, environment: Mapping[str, str] | None = None
) -> Iterator[Group]:
    _start_server()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    (folder / "printed").touch()
    mask = os.umask(0)
    os.umask(mask)
    # One environment, one cache of compiled operators: the common one is compiled anew for each other's sources.
    extensions = str(Path(sys.executable).parents[1] / "torch_extensions")
    common = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions} | dict(environment or {})
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    place |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    group = Group(folder)
    try:
        for rank in range(world):
            # Alone, a process gets no place from anybody, as with plain python.
            own = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            group._add(_Setting(rank, folder, common | own, Path.cwd(), mask), target, args)
        yield group
    finally:
        group.kill()
        shutil.rmtree(folder)


def free_port() -> int:
    """Return a port that nobody listens on, outside the range from which the system hands out its own."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _run(
    body: Callable[..., Any], args: tuple[Any, ...], world: int, timeout_s: float, grace_s: float
) -> tuple[list[Outcome], str]:
    with start(body, *args, world=world) as group:
        running = group._wait(timeout_s, until_one_fails=True)
        why = f"killed: still running after {timeout_s:g} s"
        if running and any(group.exitcodes()):
            running = group._wait(min(grace_s, timeout_s))
            why = "killed: it went on after another rank had failed"
        if running:
            group.kill(explain=True)
        ended = [
            _outcome(group._folder / f"{rank}.pickle", process.exitcode or 0, why if rank in running else None)
            for rank, process in enumerate(group._processes)
        ]
        return ended, group.printed()


def _outcome(file: Path, exitcode: int, killed: str | None) -> Outcome:
    if file.is_file() and killed is None:
        value, error, text = pickle.loads(file.read_bytes())
        return Outcome(value, error, text, exitcode)
    return Outcome(None, None, killed or f"died with exit code {exitcode}", exitcode)


def _start_server() -> None:
    before = dict(os.environ)
    os.environ.clear()
    # The server looks for our modules where this process found them.
    os.environ.update(_SERVER_ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---- in a rank -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """The state that a rank takes over from the process that asked for it."""

    rank: int
    folder: Path
    environment: dict[str, str]
    cwd: Path
    umask: int


def _enter(setting: _Setting, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Become a rank, and call ``target``."""
    os.setsid()  # what the rank starts is killed with it
    printed = os.open(setting.folder / "printed", os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.chdir(setting.cwd)
    os.umask(setting.umask)
    os.environ.clear()
    os.environ.update(setting.environment)
    sys.stdout.reconfigure(write_through=True)
    import tests.ranks.preload  # noqa: F401  the server ignores its import errors; here they show

    target(setting, *args)


def _die_with_parent() -> None:
    """End with the pytest process, which a kill may have ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(os.getpid(), signal.SIGKILL)


def _body(setting: _Setting, body: Callable[..., Any], *args: Any) -> None:
    """Leave behind what ``body(*args)`` returns or raises."""
    value, error, text = None, None, ""
    try:
        value = body(*args)
    except BaseException as raised:
        error, text = raised, traceback.format_exc()
    try:
        pickled = pickle.dumps((value, error, text))
        pickle.loads(pickled)
    except Exception:
        pickled = pickle.dumps((None, None, text or traceback.format_exc()))
        text = text or "not picklable"
    (setting.folder / f"{setting.rank}.pickle").write_bytes(pickled)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if text else 0)  # a tidy end would wait for ranks that may be gone


def _script(setting: _Setting, path: str | Path, *arguments: str) -> None:
    """Be ``python path *arguments``; DeepSpeed's launcher puts a local rank before the arguments."""
    full = REPOSITORY / path
    local = [f"--local_rank={setting.rank}"] if "LOCAL_RANK" in setting.environment else []
    sys.argv = [str(path), *local, *arguments]
    sys.path.insert(0, str(full.parent))
    try:
        runpy.run_path(str(full), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without
