"""Test that prefetching changes when items are computed, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from sws_dist.data.prefetch import prefetch_items


def test_order_and_end() -> None:
    assert list(prefetch_items(range(50), depth=3)) == list(range(50))
    assert list(prefetch_items([], depth=2)) == []
    assert list(prefetch_items([None], depth=2)) == [None]


def test_prefetches_depth_items_in_another_thread() -> None:
    made: list[tuple[int, int]] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append((i, threading.get_ident()))
            yield i

    ahead = prefetch_items(items(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # the item that was yielded, and three more
    assert threading.get_ident() not in {thread for _, thread in made}


def test_errors_are_raised_at_their_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    ahead = prefetch_items(items(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="gone"):
        next(ahead)


def test_stopping_early_leaves_no_thread() -> None:
    before = threading.active_count()
    ahead = prefetch_items(iter(range(10**9)), depth=4)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
