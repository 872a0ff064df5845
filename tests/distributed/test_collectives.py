"""Test ``raise_on_all_ranks``: a failure on one rank is the same error on all of them, and no rank waits."""

from __future__ import annotations

import pytest
import torch

from sws_dist.distributed.collectives import raise_on_all_ranks, sum_over_ranks
from sws_dist.distributed.init import init_distributed
from sws_dist.errors import ConfigError, RunError
from tests import ranks

WORLD = 3


def fail_together(failures: dict[int, Exception]) -> int:
    """Fail as ``failures`` says of this rank; all ranks have to be able to go on together afterwards."""
    world = init_distributed(60)
    try:
        with raise_on_all_ranks("read the file"):
            if world.rank in failures:
                raise failures[world.rank]
    finally:
        total = sum_over_ranks(torch.tensor(1.0))
    return int(total)


def messages(failures: dict[int, Exception], world: int = WORLD) -> list[str]:
    """Return what every rank raised, as text with its type."""
    ended, printed = ranks.outcomes(fail_together, failures, world=world)
    assert all(outcome.exitcode in (0, 1) for outcome in ended), printed
    return [f"{type(outcome.error).__name__}: {outcome.error}" for outcome in ended]


def test_where_nothing_fails_all_go_on() -> None:
    assert ranks.run(fail_together, {}, world=WORLD) == [WORLD] * WORLD


@pytest.mark.parametrize("error", [ValueError, OSError, RunError, ConfigError])
def test_what_one_rank_meets_all_ranks_raise(error: type[Exception]) -> None:
    wanted = "RunError: no such file (rank 1 of 3, while it tried to read the file)"
    assert messages({1: error("no such file")}) == [wanted] * WORLD


def test_of_several_failures_the_first_ranks_is_told() -> None:
    wanted = "RunError: second (rank 1 of 3, while it tried to read the file)"
    assert messages({2: ValueError("third"), 1: OSError("second")}) == [wanted] * WORLD


def test_what_all_ranks_meet_names_no_rank() -> None:
    assert messages({rank: ValueError("the same") for rank in range(WORLD)}) == ["RunError: the same"] * WORLD


def test_a_bug_keeps_its_type_where_it_is_and_ends_the_others() -> None:
    others = "RunError: 'name' (rank 1 of 3, while it tried to read the file)"
    assert messages({1: KeyError("name")}) == [others, "KeyError: 'name'", others]


def test_an_error_without_words_is_told_by_its_type() -> None:
    wanted = "RunError: TimeoutError (rank 0 of 2, while it tried to read the file)"
    assert messages({0: TimeoutError()}, world=2) == [wanted] * 2


def test_alone_an_error_stays_as_it_is() -> None:
    assert messages({0: ValueError("no such file")}, world=1) == ["ValueError: no such file"]
