"""Notice a run that hangs: every rank writes a heartbeat, and a message names the rank whose heartbeat stopped.

    OUTPUT/heartbeats/rank-00003.json    rank, host, process, step, and its phase; rewritten every few seconds

A thread of each rank writes its file, and looks at the others' only once its own run has stood still for a while.
A rank is stale when its file does not change: no two clocks are compared. Before a rank ends because of the others, it
leaves a record (``flight_recorder.py``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from sws_dist.distributed.flight_recorder import FlightRecorder
from sws_dist.distributed.init import World
from sws_dist.distributed.launch_env import ANY_RANK
from sws_dist.distributed.step_timer import StepTimer, StepTimes
from sws_dist.errors import EXIT_PEER_LOST, Stopped, exit_now

_STEP = "taking a step"
_TICK_S = 0.5
_LONGEST_INTERVAL_S = 5.0
_MAX_NAMED = 8

log = logging.getLogger(__name__)


class Heartbeat:
    """Write this rank's heartbeat, and end the process when the run has made no progress for too long.

    Args:
        folder: where all ranks' files are.
        timeout_s: seconds without progress after which the process says which ranks are missing and ends
            (``train.timeout_s``).
        recorder: writes what this rank was doing before that.
    """

    def __init__(self, folder: Path, world: World, timeout_s: float, recorder: FlightRecorder) -> None:
        self.step = 0
        self._recorder = recorder
        self._folder, self._world, self._timeout_s = folder, world, timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, max(1.0, timeout_s / 60))
        self._patience_s = min(60.0, timeout_s / 4)
        self._phase, self._last_progress = _STEP, time.monotonic()
        self._timer = StepTimer()
        self._num_written = 0
        self._stop, self._exiting = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._monitor, name="heartbeat", daemon=True)
        if world.is_rank_zero:
            folder.mkdir(exist_ok=True)
            for old in (*folder.glob("rank-*.json"), *folder.glob("rank-*.tmp")):  # of a run with more ranks
                old.unlink(missing_ok=True)

    # ---- progress of this rank -----------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the block as phase ``name`` and count its time as such. Outside, the run takes a step."""
        start = self._last_progress = time.monotonic()
        self._phase = name
        try:
            yield
        finally:
            self._last_progress = time.monotonic()
            self._phase = _STEP
            self._timer.add(name, self._last_progress - start)

    def tick(self) -> None:
        """Report progress inside a long phase."""
        self._last_progress = time.monotonic()

    def finish_step(self) -> StepTimes:
        """Report progress, and return the times since the last call."""
        self.tick()
        return self._timer.finish_step()

    # ---- the other ranks -----------------------------------------------------------------------------------------

    @contextmanager
    def monitoring(self) -> Iterator[None]:
        """Monitor the run inside the block. A lost connection ends the process and names the missing ranks.

        A run that fails leaves its heartbeats behind: they say where it was.
        """
        self.tick()
        self._write()  # at once: a rank that is lost in its first steps has a name as well
        self._thread.start()
        try:
            yield
        except Stopped:
            self._close()
            raise
        except BaseException as error:
            if _is_peer_lost(error):
                # gloo: [file:line] what happened. Advice
                what = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
                self._exit(f"lost the connection to other ranks ({what})", error)
            self._stop.set()  # the process may have other things to do
            raise
        self._close()

    def _close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)  # not for ever: the disk may hang
        self._path(self._world.rank).unlink(missing_ok=True)

    def _monitor(self) -> None:
        written = reported = 0.0
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            if now - written >= self._interval_s:
                written = now
                self._write()
            idle = now - self._last_progress
            if idle >= self._interval_s and self._recorder.is_record_wanted and self._exiting.acquire(blocking=False):
                self._record(f"no progress for {idle:.0f} s, and another rank has met an error")
                self._exiting.release()
            if idle >= self._timeout_s and self._world.size > 1:
                self._exit(f"no progress for {idle:.0f} s (train.timeout_s {self._timeout_s:g})")
            elif idle >= self._patience_s and now - max(reported, self._last_progress) >= self._patience_s:
                reported = now
                report = self._observe_stall()
                if report and self._last_progress + self._patience_s < time.monotonic():
                    log.warning("no progress for %.0f s: %s", idle, report, extra=ANY_RANK)

    def _exit(self, reason: str, error: BaseException | None = None) -> None:
        self._exiting.acquire()  # the other thread may come here too, when a rank that has reported it is gone
        self._record(reason, error)
        report = self._observe_stall()
        if report is None:
            time.sleep(4 * _TICK_S)  # so that the rank that reports can do so first
        else:
            log.error("%s; %s%s. The last checkpoint is whole", reason, report, self._find_hang(), extra=ANY_RANK)
        exit_now(EXIT_PEER_LOST)

    def _record(self, reason: str, error: BaseException | None = None) -> None:
        """Write what this rank is doing. Nothing that goes wrong here may keep it from ending."""
        try:
            self._recorder.write(f"{reason}; {self._phase} after step {self.step}", error)
        except Exception as problem:
            log.warning("%s: no record of what this rank did (%s)", self._recorder.folder, problem, extra=ANY_RANK)

    def _find_hang(self) -> str:
        """Return what the records of all ranks say, for the end of a message."""
        try:
            found = self._recorder.find_hang()
        except Exception as problem:
            found = f"their records cannot be compared ({problem})"
        return "".join(f"; {part}" for part in (found, f"what each rank did: {self._recorder.folder}") if part)

    def _observe_stall(self) -> str | None:
        """Watch the heartbeats for a while, and describe the stale ranks, or each rank's phase.

        Returns None where a lower rank is alive to report it.
        """
        if self._world.rank and not self._stale_ranks([0]):
            return None
        ranks = range(self._world.size)
        stale = self._stale_ranks(ranks)
        if any(rank not in stale for rank in range(self._world.rank)):
            return None
        if stale:
            return _describe(stale, "silent, last seen")
        found = {rank: json.loads(text) for rank in ranks if (text := self._read(rank))}
        busy = {rank: last for rank, last in found.items() if last["doing"] != _STEP}
        if not busy:
            return "all ranks are alive and taking a step: compiling, computing, or waiting for the network"
        return _describe(busy, "alive,")

    def _stale_ranks(self, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Return the ranks whose file does not change within two intervals, with its contents.

        The call takes as long, and this rank's own heartbeat goes on meanwhile.
        """
        before = {rank: self._read(rank) for rank in ranks if rank != self._world.rank}
        until = time.monotonic() + 2 * self._interval_s + _TICK_S
        while time.monotonic() < until:
            self._write()
            time.sleep(min(self._interval_s, max(0.0, until - time.monotonic())))
        return {rank: json.loads(text or "{}") for rank, text in before.items() if text == self._read(rank)}

    def _write(self) -> None:
        self._num_written += 1
        own = {
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "doing": self._phase,
            "beat": self._num_written,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        path = self._path(self._world.rank)
        with suppress(OSError):  # a full or absent disk is for the run itself to report
            temporary = path.with_suffix(f".{threading.get_ident()}.tmp")  # two threads may write
            temporary.write_text(json.dumps(own) + "\n")
            os.replace(temporary, path)  # a rank that is stopped while it writes keeps its name

    def _read(self, rank: int) -> str:
        """Return a rank's file as text; empty where there is none."""
        try:
            return self._path(rank).read_text()
        except OSError:
            return ""

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"


def find_live_rank(folder: Path) -> dict[str, Any] | None:
    """Return what the heartbeat of a rank says whose file in ``folder`` is still rewritten; None if no run is at work.

    A run that was killed leaves its heartbeats behind. Those of a process that this host no longer has, and those
    that are older than a minute, by the file system's own clock, are not watched; others are, for two intervals.
    """
    if not (files := sorted(folder.glob("rank-*.json"))):
        return None
    with tempfile.TemporaryFile(dir=folder) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    before: dict[Path, str] = {}
    for file in files:
        with suppress(OSError, ValueError):  # gone, or not ours
            text = file.read_text()
            last = json.loads(text)
            is_here = last["host"] == socket.gethostname()
            if now - file.stat().st_mtime < 60 and not (is_here and not psutil.pid_exists(last["pid"])):
                before[file] = text
    until = time.monotonic() + 2 * _LONGEST_INTERVAL_S
    while before and time.monotonic() < until:
        time.sleep(_TICK_S)
        for file, text in before.items():
            with suppress(OSError, ValueError):
                if (found := file.read_text()) != text:
                    return json.loads(found)
    return None


def _is_peer_lost(error: BaseException) -> bool:
    """Return True if a collective failed because another rank did not take part."""
    # gloo's errors have no type of their own, but they name the place in its sources that they come from.
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "third_party/gloo" in str(error))


def _describe(ranks: dict[int, dict[str, Any]], state: str) -> str:
    """Describe the first few of ``ranks`` by what their files say."""
    lines = []
    for rank, last in list(ranks.items())[:_MAX_NAMED]:
        if last:
            where = f"{last['host']} (process {last['pid']})"
            lines.append(f"rank {rank} on {where}: {state} {last['doing']} after step {last['step']}, {last['time']}")
        else:
            lines.append(f"rank {rank}: no sign of life")
    more = len(ranks) - len(lines)
    return "; ".join(lines) + (f"; and {more} more ranks" if more else "")
