"""Three stages of work at the same time: reading in a thread, computing in the caller's, writing in others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["overlapped"]

ReadT = TypeVar("ReadT")
ComputedT = TypeVar("ComputedT")

#: Items that may wait between two stages: enough that neither waits for the other's next one.
WAITING = 2


def overlapped(
    items: Iterable[ReadT], compute: Callable[[ReadT], ComputedT], write: Callable[[ComputedT], None], writers: int = 1
) -> None:
    """Take items in a thread, `compute` each here, and `write` each result in another thread, all in order.

    An exception of any of them ends all, and is raised here. So does Ctrl-C, which Python hands to the main thread.
    What is computed is still written, unless writing failed. When this returns or raises, no thread is left.

    Args:
        writers: threads that write; of several, none waits for the others.
    """
    source, end, failed = iter(items), object(), list[BaseException]()

    def write_next(result: ComputedT) -> None:
        if not failed:
            try:
                write(result)
            except BaseException as error:
                failed.append(error)
                raise

    reader, writer = ThreadPoolExecutor(1, "esc_arch reading"), ThreadPoolExecutor(writers, "esc_arch writing")
    reading: deque[Future[Any]] = deque(reader.submit(next, source, end) for _ in range(WAITING))
    writing: deque[Future[None]] = deque()
    try:
        while (item := reading.popleft().result()) is not end:
            reading.append(reader.submit(next, source, end))
            writing.append(writer.submit(write_next, compute(item)))
            if len(writing) > WAITING:
                writing.popleft().result()
        for each in writing:
            each.result()
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()
