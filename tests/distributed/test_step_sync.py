"""Test the exchange of status after a step: the same table on every rank, read one step late."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import torch

from sws_dist.data.loader import Batch
from sws_dist.distributed.init import init_distributed
from sws_dist.distributed.signals import deferred_signals, install_handlers, requested_signal
from sws_dist.distributed.step_sync import StepStatus, StepSync, StopAwareIterator
from sws_dist.distributed.step_timer import StepTimes
from tests import ranks

WORLD = 3


def post_twice() -> tuple[list[str | None], list[StepStatus]]:
    """Post two steps and collect after each, and once more than there is something to collect."""
    world = init_distributed(60)
    seen: list[StepStatus] = []
    sync = StepSync([seen.append])
    told = [sync.collect()]
    for step in (1, 2):
        loss = torch.tensor(10.0 * step + world.rank)
        times = StepTimes(1.0 + world.rank, 0.5, 0.25)
        failed, writing = (step, world.rank) == (2, 2), (step, world.rank) == (1, 0)
        sync.post(step, loss, times, applied=step == 1, failed=failed, writing=writing)
        assert len(seen) == step - 1, "no callback is called before the status is collected"
        told += [sync.collect(), sync.collect()]
    return told, seen


def test_all_ranks_collect_the_same_status_and_each_step_once() -> None:
    times = [StepTimes(1.0 + rank, 0.5, 0.25) for rank in range(WORLD)]
    wanted = [
        StepStatus(1, [10.0, 11.0, 12.0], applied=True, failed=False, writing=True, stop_requested=None, times=times),
        StepStatus(2, [20.0, 21.0, 22.0], applied=False, failed=True, writing=False, stop_requested=None, times=times),
    ]
    for told, seen in ranks.run(post_twice, world=WORLD):
        assert told == [None] * 5
        assert seen == wanted


def apply_on_all_but(rank: int) -> bool:
    world = init_distributed(60)
    seen: list[StepStatus] = []
    sync = StepSync([seen.append])
    sync.post(1, torch.tensor(0.0), StepTimes(0, 0, 0), applied=world.rank != rank, failed=False, writing=False)
    sync.collect()
    return seen[0].applied


def test_a_step_counts_as_applied_only_where_all_ranks_applied_it() -> None:
    assert ranks.run(apply_on_all_but, 1, world=2) == [False, False]
    assert ranks.run(apply_on_all_but, -1, world=2) == [True, True]


class Unsound(Exception):
    pass


def check_the_loss(status: StepStatus) -> None:
    if max(status.losses) > 1:
        raise Unsound(f"step {status.step}")


def post_with_a_callback() -> list[str]:
    world = init_distributed(60)
    after: list[StepStatus] = []
    sync = StepSync([check_the_loss, after.append])
    loss = torch.tensor(2.0 if world.rank == 1 else 0.0)
    sync.post(1, loss, StepTimes(0, 0, 0), applied=True, failed=False, writing=False)
    try:
        sync.collect()
    except Unsound as error:
        return [str(error), f"{len(after)} later callbacks were called"]
    return []


def test_a_callback_that_raises_does_so_on_all_ranks_before_later_ones() -> None:
    assert ranks.run(post_with_a_callback, world=WORLD) == [["step 1", "0 later callbacks were called"]] * WORLD


def send(rank: int, number: signal.Signals) -> None:
    """Signal this process if it is ``rank``, and wait until it has noticed."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), number)
        while not requested_signal():
            time.sleep(0.001)


def with_a_signal(what: Callable[[], object]) -> object:
    install_handlers()
    init_distributed(60)
    with deferred_signals():
        return what()


def collect_a_signal() -> list[str | None]:
    sync = StepSync([])
    told = []
    for step in (1, 2):
        if step == 2:
            send(1, signal.SIGUSR1)
        sync.post(step, torch.tensor(0.0), StepTimes(0, 0, 0), applied=True, failed=False, writing=False)
        told.append(sync.collect())
    return told


def test_a_signal_to_one_rank_is_told_on_all() -> None:
    assert ranks.run(with_a_signal, collect_a_signal, world=WORLD) == [[None, "SIGUSR1 on rank 1"]] * WORLD


def batches_until_told() -> tuple[list[int], int, bool]:
    def batches() -> object:
        for position in range(10):
            if position == 3:
                send(0, signal.SIGTERM)
            yield Batch(torch.empty(0), torch.empty(0), np.empty(0), np.empty(0), positions=np.array([position]))

    moves: list[None] = []
    until = StopAwareIterator(batches(), torch.device("cpu"), lambda: moves.append(None))
    return [batch.position for batch in until], len(moves), until.stop_requested


def test_a_loop_of_batches_stops_on_all_ranks_one_batch_after_the_vote() -> None:
    """Rank 0 is told before batch 3, votes after it, and the vote is read after batch 4."""
    assert ranks.run(with_a_signal, batches_until_told) == [([0, 1, 2, 3, 4], 5, True)] * 2


def all_batches() -> tuple[int, bool]:
    batches = [Batch(torch.empty(0), torch.empty(0), np.empty(0), np.empty(0))] * 4
    until = StopAwareIterator(batches, torch.device("cpu"), lambda: None)
    return len(list(until)), until.stop_requested


def test_a_loop_that_nobody_stops_is_whole() -> None:
    assert ranks.run(with_a_signal, all_batches) == [(4, False)] * 2
