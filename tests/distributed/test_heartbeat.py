"""Test what heartbeats say, how a step's time is split, and which rank is named when one is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sws_dist.distributed.collectives import gather_scalars, sum_over_ranks
from sws_dist.distributed.flight_recorder import FlightRecorder
from sws_dist.distributed.heartbeat import Heartbeat
from sws_dist.distributed.init import World, init_distributed
from sws_dist.distributed.step_timer import WAITING_FOR_DATA, WRITING_LOG
from sws_dist.errors import EXIT_PEER_LOST, Stopped
from sws_dist.logging.console import setup_console
from tests import ranks

ALONE = World(0, 1, 0, torch.device("cpu"), 1)


def make_heartbeat(folder: Path, world: World, timeout_s: float) -> Heartbeat:
    return Heartbeat(folder, world, timeout_s, FlightRecorder(folder / "crash", world))


def read(file: Path) -> dict[str, Any]:
    """Wait for a heartbeat that is there and whole."""
    while True:
        try:
            return json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.01)


def wait_for(file: Path, key: str, value: object) -> dict[str, Any]:
    while (last := read(file))[key] != value:
        time.sleep(0.01)
    return last


def test_a_heartbeat_says_who_and_where_it_is_and_beats(tmp_path: Path) -> None:
    heartbeat, file = make_heartbeat(tmp_path / "beats", ALONE, 60), tmp_path / "beats" / "rank-00000.json"
    with heartbeat.monitoring():
        first = read(file)
        assert (first["rank"], first["host"], first["pid"]) == (0, socket.gethostname(), os.getpid())
        assert (first["step"], first["doing"]) == (0, "taking a step")
        heartbeat.step = 7
        with heartbeat.phase(WAITING_FOR_DATA):
            assert wait_for(file, "doing", WAITING_FOR_DATA)["beat"] > first["beat"]
        assert wait_for(file, "doing", "taking a step")["step"] == 7
    assert not file.exists(), "a run that ends well takes its heartbeat away"


def test_only_a_run_that_fails_leaves_its_heartbeat(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000.json"

    def fail(heartbeat: Heartbeat, error: type[Exception]) -> None:
        with heartbeat.monitoring():
            read(file)
            raise error

    with pytest.raises(Stopped):
        fail(make_heartbeat(tmp_path, ALONE, 60), Stopped)
    assert not file.exists()
    failing = make_heartbeat(tmp_path, ALONE, 60)
    with pytest.raises(KeyError):
        fail(failing, KeyError)
    assert file.exists()
    failing._stop.set()
    failing._thread.join()


def test_heartbeats_of_a_larger_run_before_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "rank-00005.json").write_text("{}\n")
    make_heartbeat(tmp_path, World(1, 2, 1, torch.device("cpu"), 1), 60)
    assert (tmp_path / "rank-00005.json").exists(), "only rank 0 clears"
    make_heartbeat(tmp_path, ALONE, 60)
    assert not (tmp_path / "rank-00005.json").exists()


def test_the_time_of_a_step_is_split_into_data_log_and_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("sws_dist.distributed.heartbeat.time.monotonic", lambda: now)
    heartbeat = make_heartbeat(tmp_path, ALONE, 60)
    for _ in range(2):
        with heartbeat.phase(WAITING_FOR_DATA):
            pass_time(2)
        pass_time(1)
    with heartbeat.phase(WRITING_LOG):
        pass_time(4)
    assert heartbeat.finish_step() == (10.0, 4.0, 4.0)
    pass_time(3)
    assert heartbeat.finish_step() == (3.0, 0.0, 0.0), "each step begins anew"


def hang_in(folder: Path, silent: bool) -> None:
    """Stand still, on rank 1 without a heartbeat or waiting for data."""
    setup_console()
    world = init_distributed(60)
    heartbeat = make_heartbeat(folder, world, timeout_s=2)
    with heartbeat.monitoring():
        if world.rank == 1:
            with heartbeat.phase(WAITING_FOR_DATA):
                wait_for(folder / "rank-00001.json", "doing", WAITING_FOR_DATA)
                if silent:
                    os.kill(os.getpid(), signal.SIGSTOP)
                signal.pause()
        sum_over_ranks(torch.ones(3, 2))


def test_a_silent_rank_is_named_and_the_others_leave(tmp_path: Path) -> None:
    with ranks.start(hang_in, tmp_path, True, world=3) as group:
        pid = group.processes[1].pid
        while group.exitcodes()[0] is None or group.exitcodes()[2] is None:
            time.sleep(0.01)
        assert group.exitcodes() == [EXIT_PEER_LOST, None, EXIT_PEER_LOST]
        errors = [line for line in group.printed().splitlines() if line.startswith("error: ")]
    # Rank 0 says it. On a machine so busy that rank 2 looks only when rank 0 is gone, it may add a line.
    name = f"rank 1 on {socket.gethostname()} (process {pid}): silent, last seen {WAITING_FOR_DATA} after step 0"
    assert re.search(rf"no progress for \d+ s \(train.timeout_s 2\); {re.escape(name)}", errors[0])
    callers = (
        r"sum_over_ranks at distributed/collectives.py:\d+, called by hang_in at distributed/test_heartbeat.py:\d+"
    )
    hang = rf"ranks 0, 2 came to all_reduce number \d+ of Float\[3, 2\] \({callers}\), rank 1 left no record"
    assert re.search(rf"; {hang}; ", errors[0])
    assert f"what each rank did: {tmp_path / 'crash'}. " in errors[0]
    records = sorted(file.name for file in (tmp_path / "crash").glob("*.txt"))
    assert records == ["rank-00000.txt", "rank-00002.txt"]
    record = (tmp_path / "crash" / "rank-00002.txt").read_text()
    assert record.startswith(f"rank 2 of 3 on {socket.gethostname()}, ")
    main = record.partition("Thread MainThread")[2].partition("Thread ")[0]
    assert "in sum_over_ranks" in main, "the stack that hangs"
    assert "Thread heartbeat" in record
    assert re.search(r"all_reduce number \d+ of Float\[3, 2\] .*, not finished$", record, re.M)


def test_a_rank_that_is_alive_is_named_with_what_it_waits_for(tmp_path: Path) -> None:
    with ranks.start(hang_in, tmp_path, False, world=2) as group:
        assert group.wait() == [EXIT_PEER_LOST, EXIT_PEER_LOST]
        errors = [line for line in group.printed().splitlines() if line.startswith("error: ")]
    assert "rank 1 on" in errors[0]
    assert f"alive, {WAITING_FOR_DATA} after step 0" in errors[0]
    assert re.search(r"; rank 0 came to all_reduce number \d+ of Float\[3, 2\] \(.*\), rank 1 did not; ", errors[0])
    assert "signal.pause()" in (tmp_path / "crash" / "rank-00001.txt").read_text()


def leave_a_collective_out(folder: Path) -> None:
    setup_console()
    world = init_distributed(60)
    with make_heartbeat(folder, world, timeout_s=2).monitoring():
        sum_over_ranks(torch.ones(5))
        if world.rank == 0:
            sum_over_ranks(torch.ones(3, 2))
        gather_scalars(torch.tensor(1.0))
        sum_over_ranks(torch.ones(5))


def test_a_collective_that_one_rank_leaves_out_is_named(tmp_path: Path) -> None:
    with ranks.start(leave_a_collective_out, tmp_path, world=2) as group:
        assert group.wait() == [EXIT_PEER_LOST, EXIT_PEER_LOST]
        errors = [line for line in group.printed().splitlines() if line.startswith("error: ")]
    zero, one = r"all_reduce number (\d+) of Float\[3, 2\]", r"all_gather number \1 of Float\[1\]"
    assert re.search(rf"the ranks are in different collectives: rank 0 in {zero} \(.*\), rank 1 in {one} ", errors[0])


def lose_a_rank(folder: Path) -> None:
    setup_console()
    world = init_distributed(60)
    with make_heartbeat(folder, world, timeout_s=60).monitoring():
        if world.rank == 0:
            os._exit(0)
        sum_over_ranks(torch.tensor(1.0))


def test_a_lost_connection_ends_the_rank_and_says_who_is_gone(tmp_path: Path) -> None:
    with ranks.start(lose_a_rank, tmp_path, world=2) as group:
        assert group.wait() == [0, EXIT_PEER_LOST]
        printed = group.printed()
    assert "error: lost the connection to other ranks (" in printed
    assert "rank 0: no sign of life" in printed or "rank 0 on" in printed
    assert re.search(r"; rank 1 came to all_reduce number \d+ of Float\[\] .*, rank 0 left no record; ", printed)
    record = (tmp_path / "crash" / "rank-00001.txt").read_text()
    assert "RuntimeError: [" in record
    assert "in lose_a_rank" in record.partition("Thread ")[0], "where the connection broke"
    assert "Traceback" not in printed
