"""Who keeps the others waiting: a heartbeat of every rank, and a message that names the rank that went silent.

    OUTPUT/heartbeats/rank-00003.json    rank, host, process, step, and what it is doing; rewritten every few seconds

A thread of each rank writes its file, and looks at the others' only once its own run has stood still for a while.
A rank is silent when its file does not change: no two clocks are compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sws_dist.distributed.collectives import is_peer_lost
from sws_dist.distributed.init import World
from sws_dist.errors import EXIT_PEER_LOST, Stopped

DATA, LOG = "waiting for data", "writing the log"
_STEP = "taking a step"
_TICK_S = 0.5
_NAMED = 8


class StepTimes(NamedTuple):
    """Seconds since the lap before, and of these: waiting for data, writing the log."""

    seconds: float
    data: float
    log: float


class Heartbeat:
    """This rank's heartbeat and account of its time.

    Args:
        folder: where all ranks' files are.
        timeout_s: without progress for so long, the process says who is missing and ends (``train.timeout_s``).
    """

    def __init__(self, folder: Path, world: World, timeout_s: float) -> None:
        self.step = 0
        self._folder, self._world, self._timeout_s = folder, world, timeout_s
        self._beat_s = min(5.0, max(1.0, timeout_s / 60))
        self._patience_s = min(60.0, timeout_s / 4)
        self._doing, self._moved = _STEP, time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lap = time.monotonic()
        self._beats = 0
        self._end, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if world.is_main:
            folder.mkdir(exist_ok=True)
            for old in folder.glob("*.json"):  # of a run with more ranks
                old.unlink(missing_ok=True)

    # ---- what this rank does -------------------------------------------------------------------------------------

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The block is ``what`` to the others, and its time counts as such. Outside, the run takes a step."""
        start = self._moved = time.monotonic()
        self._doing = what
        try:
            yield
        finally:
            self._moved = time.monotonic()
            self._doing = _STEP
            self._seconds[what] += self._moved - start

    def moved(self) -> None:
        """Something went on, within a long ``doing``."""
        self._moved = time.monotonic()

    def lap(self) -> StepTimes:
        self.moved()
        lap = StepTimes(self._moved - self._lap, self._seconds[DATA], self._seconds[LOG])
        self._lap = self._moved
        self._seconds.clear()
        return lap

    # ---- the others ----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the run inside the block. A lost connection ends the process and says who is missing.

        A run that fails leaves its heartbeats behind: they say where it was.
        """
        self.moved()
        self._thread.start()
        try:
            yield
        except Stopped:
            self._close()
            raise
        except RuntimeError as error:
            if not is_peer_lost(error):
                raise
            # gloo: [file:line] what happened. Advice
            what = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
            self._leave(f"lost the connection to other ranks ({what})")
        self._close()

    def _close(self) -> None:
        self._end.set()
        self._thread.join(timeout=5)  # not for ever: the disk may hang
        self._file(self._world.rank).unlink(missing_ok=True)

    def _run(self) -> None:
        beat = asked = 0.0
        while not self._end.wait(_TICK_S):
            now = time.monotonic()
            if now - beat >= self._beat_s:
                beat = now
                self._beat()
            idle = now - self._moved
            if idle >= self._timeout_s and self._world.size > 1:
                self._leave(f"no progress for {idle:.0f} s (train.timeout_s {self._timeout_s:g})")
            elif idle >= self._patience_s and now - max(asked, self._moved) >= self._patience_s:
                asked = now
                account = self._account()
                if account and self._moved + self._patience_s < time.monotonic():
                    print(f"no progress for {idle:.0f} s: {account}", flush=True)

    def _leave(self, why: str) -> None:
        self._leaving.acquire()  # the other thread may come here too, when a rank that has said it is gone
        account = self._account()
        if account is None:
            time.sleep(4 * _TICK_S)  # so that the rank that knows can say so first
        else:
            print(f"error: {why}; {account}. The last checkpoint is whole", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_PEER_LOST)

    def _account(self) -> str | None:
        """Who is silent, or what each rank is doing; None where a rank before this one is there to say it."""
        if self._world.rank and not self._silent([0]):
            return None
        ranks = range(self._world.size)
        silent = self._silent(ranks)
        if any(rank not in silent for rank in range(self._world.rank)):
            return None
        if silent:
            return _describe(silent, "silent, last seen")
        found = {rank: json.loads(text) for rank in ranks if (text := self._read(rank))}
        busy = {rank: last for rank, last in found.items() if last["doing"] != _STEP}
        if not busy:
            return "all ranks are alive and taking a step: compiling, computing, or waiting for the network"
        return _describe(busy, "alive,")

    def _silent(self, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Those whose file does not change within two beats, and what it says. Takes as long; this rank beats on."""
        before = {rank: self._read(rank) for rank in ranks if rank != self._world.rank}
        until = time.monotonic() + 2 * self._beat_s + _TICK_S
        while time.monotonic() < until:
            self._beat()
            time.sleep(min(self._beat_s, max(0.0, until - time.monotonic())))
        return {rank: json.loads(text or "{}") for rank, text in before.items() if text == self._read(rank)}

    def _beat(self) -> None:
        self._beats += 1
        own = {
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "doing": self._doing,
            "beat": self._beats,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with suppress(OSError):  # a full or absent disk is for the run itself to complain of
            self._file(self._world.rank).write_text(json.dumps(own) + "\n")

    def _read(self, rank: int) -> str:
        """Empty where there is none, or where it is being written."""
        try:
            text = self._file(rank).read_text()
        except OSError:
            return ""
        return text if text.endswith("\n") else ""

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"


def _describe(ranks: dict[int, dict[str, Any]], state: str) -> str:
    """The first few of ``ranks``, with what their files say."""
    lines = []
    for rank, last in list(ranks.items())[:_NAMED]:
        if last:
            where = f"{last['host']} (process {last['pid']})"
            lines.append(f"rank {rank} on {where}: {state} {last['doing']} after step {last['step']}, {last['time']}")
        else:
            lines.append(f"rank {rank}: no sign of life")
    more = len(ranks) - len(lines)
    return "; ".join(lines) + (f"; and {more} more ranks" if more else "")
