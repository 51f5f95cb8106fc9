"""Three stages of work at the same time: reading in a thread, computing in the caller's, writing in another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["overlapped"]

Read = TypeVar("Read")
Computed = TypeVar("Computed")
Item = TypeVar("Item")

#: Items that may wait between two stages: enough that neither waits for the other's next one.
WAITING = 2
#: How often (s) a stage that waits looks whether all is to end.
PERIOD = 0.1


class _Ended(Exception):
    """Another stage has failed."""


class _Channel(Generic[Item]):
    """Items from one stage to the next, few at a time."""

    def __init__(self, ended: threading.Event) -> None:
        self.ended = ended
        self.items: queue.Queue[tuple[Item] | None] = queue.Queue(WAITING)

    def put(self, item: tuple[Item] | None) -> None:
        """Hand over an item, or None at the end, as soon as there is room."""
        while not self.ended.is_set():
            try:
                return self.items.put(item, timeout=PERIOD)
            except queue.Full:
                continue
        raise _Ended

    def __iter__(self) -> Iterator[Item]:
        while not self.ended.is_set():
            try:
                item = self.items.get(timeout=PERIOD)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item[0]
        raise _Ended


def overlapped(
    items: Iterable[Read], compute: Callable[[Read], Computed], write: Callable[[Iterable[Computed]], None]
) -> None:
    """Take items in a thread, `compute` each here, and have `write` take the results in another thread.

    The first exception of any of them ends all, and is raised here. So does Ctrl-C, which Python hands to the main
    thread. When this returns or raises, no thread is left.

    Args:
        write: is called once, with all results in order.
    """
    ended, failures = threading.Event(), list[BaseException]()
    read, computed = _Channel[Read](ended), _Channel[Computed](ended)

    def reading() -> None:
        for item in items:
            read.put((item,))
        read.put(None)

    def guarded(stage: Callable[[], None]) -> None:
        try:
            stage()
        except _Ended:
            pass
        except BaseException as error:
            failures.append(error)
            ended.set()

    threads = [
        threading.Thread(target=guarded, args=(stage,), name=f"esc_arch {name}", daemon=True)
        for name, stage in (("decoding", reading), ("encoding", lambda: write(computed)))
    ]
    for thread in threads:
        thread.start()
    try:
        for item in read:
            computed.put((compute(item),))
        computed.put(None)
        while threads[1].is_alive():
            threads[1].join(PERIOD)
    except _Ended:
        pass
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
