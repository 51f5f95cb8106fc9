"""A thread in every process of a run that ends it when another one fails.

The message of a process that fails goes through the store of the rendezvous, which torchrun's agent on the first
machine serves, or without an agent (Slurm) the process of rank 0. In every process a thread looks there once a second.
A process that is killed (SIGKILL, out of memory) says nothing: it is torchrun, or srun --kill-on-bad-exit, that ends
the others then.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

__all__ = ["FailureMonitor", "own_connection"]

#: Seconds between two looks into the store.
_POLL = 1.0
#: So many looks later the process that failed ends, which may be the one that serves the store; then, so that torchrun
#: names that one as the first, the others.
_LAST_LOOK, _AFTERWARDS = 2.5, 3.5
#: Seconds that a failing process may take to clean up before it is ended.
_CLEANING = 15.0

_FAILURE = "failure"


def own_connection(store: dist.Store) -> dist.Store:
    """Another connection to the same keys: one on which the main thread waits serves no one else."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))


class FailureMonitor:
    """A thread that ends this process when another one has failed, or when it hangs after its own failure.

    `store` is of these processes alone, and has a connection that the main thread does not use.
    """

    def __init__(self, store: dist.Store, rank: int, *, poll: float = _POLL) -> None:
        self._store, self._rank, self._poll = store, rank, poll
        self._stopping = threading.Event()
        self._deadline: tuple[float, int] | None = None  # of a failure of its own: when to end, and the exit status
        self._thread = threading.Thread(target=self._watch, name="esc_arch-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self._thread.join()

    def fail(self, status: int, message: str) -> None:
        """Tell the others that this process ends with `status`, and make sure that it does, unless one failed first."""
        mine = json.dumps({"rank": self._rank, "status": status, "message": message})
        with suppress(RuntimeError):  # the store may be gone with its process
            if self._store.compare_set(_FAILURE, "", mine).decode() != mine:
                self._thread.join()
        self._deadline = (time.monotonic() + _CLEANING, status)
        time.sleep(_LAST_LOOK * self._poll)
        atexit.register(_exit, status)

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll):
            if self._deadline is None:
                self._look_at_others()
            elif time.monotonic() > self._deadline[0]:
                _end(self._deadline[1], f"rank {self._rank} hangs after its failure")

    def _look_at_others(self) -> None:
        try:
            if not self._store.check([_FAILURE]):
                return
            failure = json.loads(self._store.get(_FAILURE))
        except RuntimeError:
            _end(1, "the rendezvous is lost: rank 0, or the torchrun that served it, was killed")
        if failure["rank"] != self._rank:
            time.sleep(_AFTERWARDS * self._poll)
            _end(failure["status"], f"rank {failure['rank']} failed: {failure['message']}")


def _end(status: int, why: str) -> NoReturn:
    print(f"{why}; stopping", file=sys.stderr, flush=True)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End this process, with the processes that load its data, whatever its other threads do."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
