"""What the ranks tell each other after a step: the same table everywhere, read one step late."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import torch

from sws_dist import comm, signals
from sws_dist.data.loader import Batch
from sws_dist.rollcall import Answers, RollCall, Until
from sws_dist.watch import Lap
from tests import ranks

WORLD = 3


def call_twice() -> tuple[list[str | None], list[Answers]]:
    """Call two steps and read after each, and once more than there is something to read."""
    world = comm.init(60)
    seen: list[Answers] = []
    roll_call = RollCall([seen.append])
    told = [roll_call.read()]
    for step in (1, 2):
        loss = torch.tensor(10.0 * step + world.rank)
        lap = Lap(1.0 + world.rank, 0.5, 0.25)
        roll_call.call(step, loss, lap, applied=step == 1, failed=step == 2 and world.rank == 2)
        assert len(seen) == step - 1, "nothing is judged before it is read"
        told += [roll_call.read(), roll_call.read()]
    return told, seen


def test_all_ranks_read_the_same_answers_and_each_step_once() -> None:
    laps = [Lap(1.0 + rank, 0.5, 0.25) for rank in range(WORLD)]
    wanted = [
        Answers(1, [10.0, 11.0, 12.0], applied=True, failed=False, told=None, laps=laps),
        Answers(2, [20.0, 21.0, 22.0], applied=False, failed=True, told=None, laps=laps),
    ]
    for told, seen in ranks.run(call_twice, world=WORLD):
        assert told == [None] * 5
        assert seen == wanted


def apply_on_all_but(rank: int) -> bool:
    world = comm.init(60)
    seen: list[Answers] = []
    roll_call = RollCall([seen.append])
    roll_call.call(1, torch.tensor(0.0), Lap(0, 0, 0), applied=world.rank != rank, failed=False)
    roll_call.read()
    return seen[0].applied


def test_a_step_counts_as_applied_only_where_all_ranks_applied_it() -> None:
    assert ranks.run(apply_on_all_but, 1, world=2) == [False, False]
    assert ranks.run(apply_on_all_but, -1, world=2) == [True, True]


class Unsound(Exception):
    pass


def judge_the_loss(answers: Answers) -> None:
    if max(answers.losses) > 1:
        raise Unsound(f"step {answers.step}")


def call_with_a_judge() -> list[str]:
    world = comm.init(60)
    after: list[Answers] = []
    roll_call = RollCall([judge_the_loss, after.append])
    roll_call.call(1, torch.tensor(2.0 if world.rank == 1 else 0.0), Lap(0, 0, 0), applied=True, failed=False)
    try:
        roll_call.read()
    except Unsound as error:
        return [str(error), f"{len(after)} later judges were asked"]
    return []


def test_a_judge_that_raises_does_so_on_all_ranks_and_comes_before_later_ones() -> None:
    assert ranks.run(call_with_a_judge, world=WORLD) == [["step 1", "0 later judges were asked"]] * WORLD


def tell(rank: int, number: signal.Signals) -> None:
    """Signal this process if it is ``rank``, and wait until it has noticed."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), number)
        while not signals.asked():
            time.sleep(0.001)


def with_a_signal(what: Callable[[], object]) -> object:
    signals.listen()
    comm.init(60)
    with signals.deferred():
        return what()


def read_a_signal() -> list[str | None]:
    roll_call = RollCall([])
    told = []
    for step in (1, 2):
        if step == 2:
            tell(1, signal.SIGUSR1)
        roll_call.call(step, torch.tensor(0.0), Lap(0, 0, 0), applied=True, failed=False)
        told.append(roll_call.read())
    return told


def test_a_signal_to_one_rank_is_told_on_all() -> None:
    assert ranks.run(with_a_signal, read_a_signal, world=WORLD) == [[None, "SIGUSR1 on rank 1"]] * WORLD


def batches_until_told() -> tuple[list[int], int, bool]:
    def batches() -> object:
        for position in range(10):
            if position == 3:
                tell(0, signal.SIGTERM)
            yield Batch(torch.empty(0), torch.empty(0), np.empty(0), np.empty(0), position=position)

    moves: list[None] = []
    until = Until(batches(), torch.device("cpu"), lambda: moves.append(None))  # type: ignore[arg-type]
    return [batch.position for batch in until], len(moves), until.told


def test_a_loop_of_batches_stops_on_all_ranks_one_batch_after_the_vote() -> None:
    """Rank 0 is told before batch 3, votes after it, and the vote is read after batch 4."""
    assert ranks.run(with_a_signal, batches_until_told) == [([0, 1, 2, 3, 4], 5, True)] * 2


def all_batches() -> tuple[int, bool]:
    batches = [Batch(torch.empty(0), torch.empty(0), np.empty(0), np.empty(0))] * 4
    until = Until(batches, torch.device("cpu"), lambda: None)
    return len(list(until)), until.told


def test_a_loop_that_nobody_stops_is_whole() -> None:
    assert ranks.run(with_a_signal, all_batches) == [(4, False)] * 2
