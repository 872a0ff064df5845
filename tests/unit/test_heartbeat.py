"""A rank's heartbeat is whole at any moment, or a rank that stops while it writes would have no name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sws_dist.distributed.flight_recorder import FlightRecorder
from sws_dist.distributed.heartbeat import Heartbeat, find_live_rank
from sws_dist.distributed.init import World


def test_a_heartbeat_is_whole_at_any_moment(tmp_path: Path) -> None:
    world = World(0, 2, 0, torch.device("cpu"), 1)
    heartbeat = Heartbeat(tmp_path, world, 60, FlightRecorder(tmp_path / "crash", world))
    heartbeat._write()
    file, done = tmp_path / "rank-00000.json", threading.Event()

    def write() -> None:
        for _ in range(2000):
            heartbeat._write()
        done.set()

    threads = [threading.Thread(target=write) for _ in range(2)]  # the monitor's, and that of a stalled run
    for thread in threads:
        thread.start()
    reads = 0
    while not done.is_set() or not reads:
        assert json.loads(file.read_text())["rank"] == 0
        reads += 1
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_run_at_work_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"), 1)
    heartbeat = Heartbeat(tmp_path, world, 60, FlightRecorder(tmp_path / "crash", world))
    assert find_live_rank(tmp_path) is None
    with heartbeat.monitoring():
        live = find_live_rank(tmp_path)
        assert live is not None
        assert live["pid"] == os.getpid()
        last = json.loads((tmp_path / "rank-00000.json").read_text())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "rank-00000.json").write_text(json.dumps(last | {"pid": gone.pid}))
    elsewhere = tmp_path / "rank-00001.json"
    elsewhere.write_text(json.dumps(last | {"host": "another"}))
    os.utime(elsewhere, (0, 0))
    (tmp_path / "rank-00002.json").write_text("not ours")
    assert find_live_rank(tmp_path) is None


def test_a_run_that_fails_stops_beating(tmp_path: Path) -> None:
    """The process may go on: a notebook trains once more."""
    world = World(0, 1, 0, torch.device("cpu"), 1)
    heartbeat = Heartbeat(tmp_path, world, 60, FlightRecorder(tmp_path / "crash", world))
    with pytest.raises(ZeroDivisionError), heartbeat.monitoring():
        raise ZeroDivisionError
    heartbeat._thread.join()
    assert (tmp_path / "rank-00000.json").is_file()
