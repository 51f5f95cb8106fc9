"""Computing on several images at once, in processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import TypeVar

import cv2
import torch
from tqdm import tqdm

from ..errors import UserError
from ..system import block_sigint

if sys.platform != "win32":
    import resource

__all__ = ["map_in_order", "require_open_files"]

TASKS_PER_PROCESS = 8
"""At least; a process needs some seconds to start, in which this one is done with several images."""

_FILES_PER_PROCESS, _OTHER_FILES = 16, 16  # open at once: images on their way, pipes; logs, LMDBs

Task = TypeVar("Task")
Result = TypeVar("Result")


def require_open_files(processes: int, option: str) -> None:
    """Raise the limit of open files, if need be, to what so many processes take here: without it they hang.

    UserError, which names the `option` that says how many there are, if the system does not allow it.
    """
    if sys.platform != "win32":  # which has no such limit
        needed = len(os.listdir("/dev/fd")) + _OTHER_FILES + processes * _FILES_PER_PROCESS
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if processes == 0 or limit == resource.RLIM_INFINITY or limit >= needed:
            return
        if most != resource.RLIM_INFINITY and most < needed:
            raise UserError(
                f"With {processes} processes about {needed} files are open at once, and the limit is {most}. Raise it "
                f"(ulimit -n {needed}), or lower {option}."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


@contextmanager
def map_in_order(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, *, finished: int = 0
) -> Iterator[Iterable[Result]]:
    """The results of `function` for all `tasks`, one per image, in their order, with a progress bar on a terminal.

    With one job, or too few tasks to be worth more, everything happens in this process; otherwise `jobs` processes
    compute, which end with the block, and at most ``jobs + 2`` results wait in memory. `finished` images are done.

    UserError if a process was killed; also what `function` raises.
    """
    total = len(tasks) + finished
    if finished:
        print(f"{finished} of {total} images are finished already.")
    with closing(_results(function, tasks, min(jobs, len(tasks) // TASKS_PER_PROCESS))) as results:
        yield tqdm(results, total=total, initial=finished, unit="image", disable=None)  # None: only on a terminal


def _results(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Generator[Result]:
    if jobs <= 1:
        yield from map(function, tasks)
        return
    require_open_files(jobs, "-j")
    # spawn: in forked children torch's thread pool can deadlock
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            block_sigint(True)  # processes that start now inherit this: Ctrl-C reaches the parent process alone
            waiting.append(pool.submit(function, task))
            block_sigint(False)
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
        block_sigint(False)
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not blocked
    torch.set_num_threads(1)  # the cores are shared out among processes already
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, and idle workers of a pool wait for ever."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]  # in a worker there is one
    os._exit(1)
