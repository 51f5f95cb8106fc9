"""Computing on several images at once, in processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
import torch
from tqdm import tqdm

from ..errors import UserError

__all__ = ["default_jobs", "map_in_order", "progress_bar"]

TASKS_PER_PROCESS = 8
"""At least; a process needs some seconds to start, in which this one is done with several images."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_jobs() -> int:
    """One process per core, but no more than 8: beyond that, the one that writes is what limits."""
    return min(os.cpu_count() or 1, 8)


def map_in_order(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Generator[Result]:
    """The results of `function` for all `tasks`, in their order, computed by `jobs` processes.

    With one job, or too few tasks to be worth more, everything happens in this process; otherwise at most ``jobs + 2``
    results wait in memory. Close the iterator (``contextlib.closing``) to end the processes when it is left early.

    UserError if a process was killed; also what `function` raises.
    """
    jobs = min(jobs, len(tasks) // TASKS_PER_PROCESS)
    if jobs <= 1:
        yield from map(function, tasks)
        return
    # spawn: in forked children torch's thread pool can deadlock
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            # Processes that start now inherit this: Ctrl-C reaches the parent process alone
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            waiting.append(pool.submit(function, task))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(waiting) == jobs + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, most often because memory ran out. "
            f"Run the same command with fewer processes than -j {jobs}; it continues."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pool.shutdown(cancel_futures=True)


def progress_bar(total: int, finished: int) -> tqdm[Any]:
    """A bar for `total` images, on a terminal only, and a line when an earlier run has `finished` some."""
    if finished:
        print(f"{finished} of {total} images are finished already.")
    return tqdm(total=total, initial=finished, unit="image", disable=None)  # None: only on a terminal


def _start_worker() -> None:
    torch.set_num_threads(1)  # the cores are shared out among processes already
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, and idle workers of a pool wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
