"""A rank's heartbeat is whole at any moment, or a rank that stops while it writes would have no name."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch

from sws_dist.distributed.flight_recorder import FlightRecorder
from sws_dist.distributed.heartbeat import Heartbeat
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
