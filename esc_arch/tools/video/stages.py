"""Three stages of work at the same time: reading in a thread, computing in the caller's, writing in another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["overlapped"]

Read = TypeVar("Read")
Computed = TypeVar("Computed")

#: Items that may wait between two stages: enough that neither waits for the other's next one.
WAITING = 2


def overlapped(items: Iterable[Read], compute: Callable[[Read], Computed], write: Callable[[Computed], None]) -> None:
    """Take items in a thread, `compute` each here, and `write` each result in another thread, all in order.

    An exception of any of them ends all, and is raised here. So does Ctrl-C, which Python hands to the main thread.
    When this returns or raises, no thread is left.
    """
    source, end = iter(items), object()
    reader, writer = ThreadPoolExecutor(1, "esc_arch decoding"), ThreadPoolExecutor(1, "esc_arch encoding")
    reading: deque[Future[Any]] = deque(reader.submit(next, source, end) for _ in range(WAITING))
    writing: deque[Future[None]] = deque()
    try:
        while (item := reading.popleft().result()) is not end:
            reading.append(reader.submit(next, source, end))
            writing.append(writer.submit(write, compute(item)))
            if len(writing) > WAITING:
                writing.popleft().result()
        for each in writing:
            each.result()
    finally:
        for executor in (reader, writer):
            executor.shutdown(cancel_futures=True)
