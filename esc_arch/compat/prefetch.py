"""Patches for `basicsr.data.prefetch_dataloader`: hooks before and after each batch, and threads that end and fail."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from esc_arch.training.run import current_run

from .failures import rescuing
from .patches import Original, patch

__all__ = ["stop_prefetching"]

_MODULE = "basicsr.data.prefetch_dataloader"

#: Of the generators that are in use.
_executors: weakref.WeakSet[ThreadPoolExecutor] = weakref.WeakSet()


@patch(_MODULE, "CPUPrefetcher.__init__", "no first iteration is thrown away")
@patch(_MODULE, "CUDAPrefetcher.__init__", "no first iteration is thrown away")
def prefetcher_init(original: Original, self: Any, loader: Any, *args: Any) -> None:
    original(self, (), *args)  # it would start workers, which `reset` starts again
    self.ori_loader = loader


@patch(_MODULE, "CPUPrefetcher.reset", "hooks before each epoch")
@patch(_MODULE, "CUDAPrefetcher.reset", "hooks before each epoch")
def prefetcher_reset(original: Original, self: Any) -> None:
    stop_prefetching()  # persistent workers must not be asked by two threads
    run = current_run()
    if run is not None:
        run.batches_of_epoch = 0
    if run is None or not run.is_over:
        original(self)


@patch(_MODULE, "CPUPrefetcher.next", "hooks before and after each batch")
@patch(_MODULE, "CUDAPrefetcher.next", "hooks before and after each batch")
def prefetcher_next(original: Original, self: Any) -> Any:
    run = current_run()
    if run is not None and not run.before_batch():
        return None
    with rescuing():
        batch = original(self)
    if run is not None and batch is not None:
        run.has_batch()
    return batch


@patch(_MODULE, "PrefetchGenerator", "its thread can be ended, and what fails in it is raised")
def prefetch_generator(_: Original, generator: Iterator[Any], num_prefetch_queue: int) -> Iterator[Any]:
    """The items of a generator, so many of them computed ahead in a thread."""
    executor = ThreadPoolExecutor(1)
    _executors.add(executor)
    ahead = deque(executor.submit(next, generator, None) for _ in range(num_prefetch_queue + 1))
    while (item := ahead.popleft().result()) is not None:
        ahead.append(executor.submit(next, generator, None))
        yield item


def stop_prefetching() -> None:
    """End the threads that load data: the interpreter would abort if one were at work when it ends."""
    for executor in list(_executors):
        executor.shutdown(cancel_futures=True)
        _executors.discard(executor)
