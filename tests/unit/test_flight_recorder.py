"""The collective that ranks hang in is found by comparing their records."""

from __future__ import annotations

import pytest

from sws_dist.distributed.flight_recorder import Collective, find_hang


def record(*names: str, first: int = 1, group: str = "0 default_pg", open_from: int = 10**6) -> list[Collective]:
    """Return one rank's collectives; those from number ``open_from`` on are not finished."""
    return [
        Collective(group, number, name, "Float[4]", [f"{name}_it at a/b.py:{number}"], finished=number < open_from)
        for number, name in enumerate(names, start=first)
    ]


STEP = ("all_reduce", "all_gather", "all_reduce")


def test_nothing_is_said_of_ranks_that_have_finished_the_same() -> None:
    assert find_hang({0: record(*STEP), 1: record(*STEP)}, 2) is None
    assert find_hang({0: [], 1: []}, 2) is None
    assert find_hang({}, 2) is None


@pytest.mark.parametrize(
    ("records", "size", "found"),
    [
        (
            {0: record(*STEP, open_from=3), 1: record(*STEP[:2]), 2: record(*STEP, open_from=3)},
            3,
            "ranks 0, 2 came to all_reduce number 3 of Float[4] (all_reduce_it at a/b.py:3), rank 1 did not",
        ),
        (  # a GPU's rank goes on in its program after the collective that it hangs in
            {0: record(*STEP, open_from=2), 1: record(*STEP[:1])},
            2,
            "rank 0 came to all_gather number 2 of Float[4] (all_gather_it at a/b.py:2), rank 1 did not",
        ),
        (
            {0: record(*STEP[:2]), 1: record(*STEP, open_from=3)},
            4,
            "rank 1 came to all_reduce number 3 of Float[4] (all_reduce_it at a/b.py:3), rank 0 did not, "
            "ranks 2, 3 left no record",
        ),
        (
            {0: record(*STEP, open_from=3), 1: record(*STEP, open_from=3)},
            2,
            "ranks 0, 1 came to all_reduce number 3 of Float[4] (all_reduce_it at a/b.py:3)",
        ),
        (  # the records begin where torch's memory begins
            {0: record(*STEP, first=8), 1: record("all_reduce", "all_reduce", first=9)},
            2,
            "the ranks are in different collectives: rank 0 in all_gather number 9 of Float[4] (all_gather_it at "
            "a/b.py:9), rank 1 in all_reduce number 9 of Float[4] (all_reduce_it at a/b.py:9)",
        ),
        (
            {rank: record(*STEP, open_from=3) for rank in range(11)},
            12,
            "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more came to all_reduce number 3 of Float[4] (all_reduce_it at "
            "a/b.py:3), rank 11 left no record",
        ),
    ],
)
def test_it_is_named(records: dict[int, list[Collective]], size: int, found: str) -> None:
    assert find_hang(records, size) == found


def test_groups_are_counted_apart() -> None:
    """A rank that is in no group of a name is not missing there."""
    mine = record(*STEP) + record("broadcast", group="1 pairs")
    yours = record(*STEP, open_from=3) + record("broadcast", "broadcast", group="2 pairs", open_from=2)
    theirs = record(*STEP[:2]) + record("broadcast", group="2 pairs")
    found = find_hang({0: mine, 1: yours, 2: theirs}, 3)
    assert found == "ranks 0, 1 came to all_reduce number 3 of Float[4] (all_reduce_it at a/b.py:3), rank 2 did not"


def test_the_group_that_is_waited_for_is_named_whatever_came_last_in_another() -> None:
    mine = record(*STEP) + record("broadcast", group="1 pairs", open_from=1)
    wanted = "rank 0 came to broadcast number 1 of Float[4] (broadcast_it at a/b.py:1), rank 1 left no record"
    assert find_hang({0: mine}, 2) == wanted


def test_tensors_may_differ_where_a_collective_allows_it() -> None:
    first = [Collective("0", 1, "all_to_all", "Float[4]", [], finished=True)]
    second = [Collective("0", 1, "all_to_all", "Float[9]", [], finished=True)]
    assert find_hang({0: first, 1: second}, 2) is None
