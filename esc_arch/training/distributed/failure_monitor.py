"""A thread in every process of a run that ends it when another one fails or shows no sign of life.

The message of a process that fails goes through the store of the rendezvous, which torchrun's agent on the first
machine serves, or without an agent (Slurm) the process of rank 0. In every process a thread looks there once a second.
A process that is killed (SIGKILL, out of memory), stopped or cut off says nothing. Each one watches the next one's
count of looks, and reports a failure in its place when that stands still.
"""

from __future__ import annotations

import atexit
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from esc_arch.errors import UserError

__all__ = ["FailureMonitor", "longest_silence", "own_connection"]

#: Seconds between two looks into the store.
_POLL = 1.0
#: Sets the seconds without a sign of life after which a process counts as failed; by default `_SILENCE`.
_VARIABLE = "ESC_ARCH_RANK_TIMEOUT"
_SILENCE, _LEAST_SILENCE = 60.0, 5.0
#: Seconds that a failing process waits for the others to read why; it may be the one that serves the store.
_READING = 3.0
#: Seconds by which the others end after the process that failed, so that torchrun names that one as the first.
_PRECEDENCE = 1.0
#: Seconds that a failing process may take to clean up before it is ended.
_CLEANING = 15.0

_FAILURE, _READERS = "failure", "readers"
#: Added to the count of looks by a process that has ended as it should.
_FINISHED = 2**32


def own_connection(store: dist.Store) -> dist.Store:
    """Another connection to the same keys: one on which the main thread waits serves no one else."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))


def longest_silence() -> float:
    """Seconds without a sign of life after which a process counts as failed; UserError if the user's are invalid."""
    text = os.environ.get(_VARIABLE, f"{_SILENCE:g}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _LEAST_SILENCE <= seconds < math.inf:
        raise UserError(
            f"{_VARIABLE}={text} in the environment: must be seconds without a sign of life, {_LEAST_SILENCE:g} or "
            f"more, after which a process of the run counts as failed (default: {_SILENCE:g})."
        )
    return seconds


class FailureMonitor:
    """A thread that ends this process when another one has failed, or when it hangs after its own failure.

    `store` is of these processes alone, and has a connection that the main thread does not use.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, poll: float = _POLL, silence: float = _SILENCE
    ) -> None:
        self._store, self._rank, self._world_size, self._poll, self._silence = store, rank, world_size, poll, silence
        self._next = (rank + 1) % world_size
        self._looks, self._heard = -1, time.monotonic()  # the next process's, and since when
        self._stopping = threading.Event()
        self._deadline: tuple[float, int] | None = None  # of a failure of its own: when to end, and the exit status
        self._thread = threading.Thread(target=self._watch, name="esc_arch-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._store.add(f"looks/{self._rank}", _FINISHED)

    def fail(self, status: int, message: str) -> None:
        """Tell the others that this process ends with `status`, and make sure that it does, unless one failed first."""
        mine = json.dumps({"rank": self._rank, "status": status, "message": message})
        with suppress(RuntimeError):  # the store may be gone with its process
            if self._store.compare_set(_FAILURE, "", mine).decode() != mine:
                self._thread.join()
        now = time.monotonic()
        self._deadline = (now + _READING + _CLEANING, status)
        with suppress(RuntimeError):
            while self._store.add(_READERS, 0) < self._world_size - 1 and time.monotonic() < now + _READING:
                time.sleep(0.05)
        atexit.register(_exit, status)

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll):
            if self._deadline is None:
                self._look_at_others()
            elif time.monotonic() > self._deadline[0]:
                self._end(self._deadline[1], f"rank {self._rank} hangs after its failure")

    def _look_at_others(self) -> None:
        try:
            self._store.add(f"looks/{self._rank}", 1)
            self._watch_next()
            if not self._store.check([_FAILURE]):
                return
            failure = json.loads(self._store.get(_FAILURE))
        except RuntimeError:
            self._end(1, "the rendezvous is lost: rank 0, or the torchrun that served it, was killed")
        if failure["rank"] != self._rank:
            self._end(failure["status"], f"rank {failure['rank']} failed: {failure['message']}", told=True)

    def _watch_next(self) -> None:
        looks, now = self._store.add(f"looks/{self._next}", 0), time.monotonic()
        if looks != self._looks or looks >= _FINISHED or self._next == self._rank:
            self._looks, self._heard = looks, now
        elif now - self._heard > self._silence:
            why = (
                f"no sign of life for {self._silence:g} s ({_VARIABLE}): it was killed or stopped, or its machine "
                "cannot be reached"
            )
            self._store.compare_set(_FAILURE, "", json.dumps({"rank": self._next, "status": 1, "message": why}))

    def _end(self, status: int, why: str, *, told: bool = False) -> NoReturn:
        print(f"{why}; stopping", file=sys.stderr, flush=True)
        if told:
            with suppress(RuntimeError):
                self._store.add(_READERS, 1)
            time.sleep(_PRECEDENCE)
        _exit(status)


def _exit(status: int) -> NoReturn:
    """End this process, with the processes that load its data, whatever its other threads do."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
