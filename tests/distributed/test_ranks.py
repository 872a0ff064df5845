"""The ranks that tests run in: what they return, how failures are told, and that nothing outlives a call."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from sws_dist import seed
from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.distributed.init import init_distributed
from tests import ranks


def place() -> tuple[int, int, int]:
    world = init_distributed(60)
    total = sum_over_ranks(torch.tensor(float(world.rank)))
    return world.rank, world.size, int(total)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_come_in_the_order_of_the_ranks(world: int) -> None:
    assert ranks.run(place, world=world) == [(rank, world, sum(range(world))) for rank in range(world)]


def late_in_reverse(pause_s: float) -> str:
    rank = int(os.environ["RANK"])
    time.sleep(pause_s * (2 - rank))
    return f"rank {rank}"


def test_the_order_does_not_depend_on_who_is_first() -> None:
    assert ranks.run(late_in_reverse, 0.2, world=3) == ["rank 0", "rank 1", "rank 2"]


def fail_on(bad: int) -> None:
    world = init_distributed(60)
    print(f"hello from rank {world.rank}", flush=True)
    if world.rank == bad:
        raise KeyError("what went wrong")
    dist.barrier()


def test_an_error_in_one_rank_is_told_with_its_traceback_and_ends_the_others() -> None:
    with pytest.raises(ranks.RanksFailed) as raised:
        ranks.run(fail_on, 1, world=3)
    message = str(raised.value)
    assert "rank 1 of 3: Traceback" in message
    assert 'raise KeyError("what went wrong")' in message
    assert "hello from rank 0" in message
    ended, _ = ranks.outcomes(fail_on, 0, world=2)
    assert isinstance(ended[0].error, KeyError)
    assert "gloo" in str(ended[1].error), "the other rank waited in a collective"


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__(lambda: None)


def raise_unpicklable() -> None:
    raise Unpicklable


def return_unpicklable() -> object:
    return lambda: None


def test_what_cannot_be_pickled_is_told_as_text() -> None:
    ended, _ = ranks.outcomes(raise_unpicklable, world=1)
    assert ended[0].error is None
    assert "raise Unpicklable" in ended[0].traceback
    with pytest.raises(ranks.RanksFailed, match="pickle"):
        ranks.run(return_unpicklable, world=1)


def die(how: str) -> None:
    world = init_distributed(60)
    if world.rank == 1:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("kill", -signal.SIGKILL)])
def test_a_rank_that_dies_is_told_with_its_exit_code(how: str, code: int) -> None:
    with pytest.raises(ranks.RanksFailed, match=f"rank 1 of 2: died with exit code {code}"):
        ranks.run(die, how)


def hang(folder: Path, bad: int, failing: int | None) -> None:
    rank = int(os.environ["RANK"])
    (folder / str(os.getpid())).touch()
    if rank == failing:
        raise ValueError("the first failure")
    while rank == bad:
        signal.pause()


def gone(folder: Path) -> bool:
    return not any(psutil.pid_exists(int(file.name)) for file in folder.iterdir())


def test_a_stuck_rank_is_killed_and_shows_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(ranks.RanksFailed) as raised:
        ranks.run(hang, tmp_path, 1, None, timeout_s=3)
    message = str(raised.value)
    assert "rank 1 of 2: killed: still running after 3 s" in message
    assert "rank 0 of 2" not in message
    assert "in hang" in message, "the stack of the stuck rank"
    assert gone(tmp_path)
    assert ranks.run(place) == [(0, 2, 1), (1, 2, 1)], "the next ranks are fresh"


def test_a_rank_that_goes_on_after_another_failed_is_killed(tmp_path: Path) -> None:
    ended, _ = ranks.outcomes(hang, tmp_path, 1, 0, grace_s=1)
    assert isinstance(ended[0].error, ValueError)
    assert ended[1].traceback == "killed: it went on after another rank had failed"
    assert gone(tmp_path)


def leave_things_behind() -> None:
    init_distributed(60)
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    seed.seed_everything(7)
    seed.seed_everything = None  # type: ignore[assignment]


def look_around() -> tuple[bool, str, bool, bool, float]:
    clean = callable(seed.seed_everything)
    return "LEFT_BEHIND" in os.environ, os.getcwd(), dist.is_initialized(), clean, random.random()


def test_a_rank_finds_nothing_of_an_earlier_one() -> None:
    ranks.run(leave_things_behind)
    for left, cwd, initialized, clean, _ in ranks.run(look_around):
        assert (left, cwd, initialized, clean) == (False, os.getcwd(), False, True)


def surroundings() -> tuple[str | None, str, int]:
    mask = os.umask(0)
    os.umask(mask)
    return os.environ.get("SEEN_BY_RANKS"), os.getcwd(), mask


def test_a_rank_sees_environment_folder_and_umask_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEEN_BY_RANKS", "yes")
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        found = ranks.run(surroundings)
    finally:
        os.umask(before)
    assert found == [("yes", str(tmp_path), 0o027)] * 2


def count_threads_of_the_server() -> int:
    return psutil.Process(os.getppid()).num_threads()


def test_the_server_has_one_thread() -> None:
    """A fork copies no other: a lock that one held would stay locked in every rank."""
    assert ranks.run(count_threads_of_the_server, world=1) == [1]


SCRIPT = """
import os, sys
print(sys.argv[1:], os.environ.get("RANK"), __name__)
if sys.argv[-1] == "fail":
    sys.exit("that was wrong")
if sys.argv[-1] == "raise":
    raise KeyError("a bug")
"""


def test_a_script_is_run_as_a_launcher_runs_it(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = ranks.script(file, "--one", "two")
    assert (done.returncode, done.stdout) == (0, "['--one', 'two'] None __main__\n")
    done = ranks.script(file, "fail", world=2)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == [
        "['--local_rank=0', 'fail'] 0 __main__",
        "['--local_rank=1', 'fail'] 1 __main__",
        "that was wrong",
        "that was wrong",
    ]
    done = ranks.script(file, "raise")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stdout


def test_ranks_under_way_can_be_signalled_and_are_killed_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text("import signal\nwhile True: signal.pause()\n")
    with ranks.start_script(file, world=2) as group:
        group.processes[0].send_signal(signal.SIGKILL)
        group.processes[0].wait(timeout=ranks.LIMIT_S)
        assert group.processes[1].is_running()
    assert group.exitcodes() == [-signal.SIGKILL, -signal.SIGKILL]
