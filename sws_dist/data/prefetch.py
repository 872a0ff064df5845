"""Work that is done before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield ``items``, computed in a thread of its own, up to ``depth`` of them ahead.

    What the thread raises is raised here, in its turn. A consumer that stops early leaves no thread behind.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        due = deque(thread.submit(next, source, end) for _ in range(depth))
        while (item := due.popleft().result()) is not end:
            due.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]
