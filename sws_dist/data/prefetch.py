"""Compute the items of an iterator ahead of time, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch_items(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield ``items`` in order, while a thread computes up to ``depth`` of them ahead.

    An exception of the thread is raised here when its item is due. A consumer that stops early leaves no thread behind.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        due = deque(thread.submit(next, source, end) for _ in range(depth))
        while (item := due.popleft().result()) is not end:
            due.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]
