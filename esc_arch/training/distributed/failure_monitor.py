"""A thread in every process of a run that ends it when another one fails, or when it is stuck itself.

The message of a process that fails goes through a store of keys that all processes reach: the one of the rendezvous,
which torchrun's agent on the first machine serves, or without an agent (Slurm) the process of rank 0. In every process
a thread looks there once a second, so that a process whose main thread waits in a collective notices as well.

A process that is killed (SIGKILL, out of memory) says nothing. Gloo, which every run has beside NCCL, raises in the
others at their next agreement, and torchrun sends them SIGTERM. Where their main thread is stuck in NCCL, so that no
signal handler of Python's runs, the same thread ends them.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

__all__ = ["FailureMonitor", "current_monitor", "progress", "start_monitor", "stop_monitor"]

#: Seconds between two looks into the store.
_POLL = 1.0
#: Seconds that a failing process waits for the others to read why; it may be the one that serves the store.
_READING = 3.0
#: Seconds by which the others end after the process that failed, so that torchrun names that one as the first.
_PRECEDENCE = 1.0
#: Seconds in which a main thread must make progress after SIGTERM or SIGINT. torchrun and Slurm kill after 30.
_GRACE = 15.0
#: Seconds that a failing process may take to clean up before it is ended.
_CLEANING = 15.0

_FAILURE, _READERS = "failure", "readers"

_monitor: FailureMonitor | None = None


def start_monitor(store: dist.Store, run: str) -> None:
    """Begin to watch the other processes of the default group.

    Args:
        store: the rendezvous's.
        run: a name that all processes give, and no earlier start of them gave: torchrun's store outlives a restart.
    """
    global _monitor
    keys = dist.PrefixStore(f"esc_arch/{run}", _own_connection(store))
    _monitor = FailureMonitor(keys, dist.get_rank(), dist.get_world_size())
    _monitor.start()


def stop_monitor() -> None:
    """End watching; nothing if it never began."""
    global _monitor
    if _monitor is not None:
        _monitor.stop()
        _monitor = None


def current_monitor() -> FailureMonitor | None:
    """The monitor of this process, if it is one of several that joined."""
    return _monitor


def progress() -> None:
    """Say that this process's main thread goes on; for signal handlers too, whose running shows just that."""
    if _monitor is not None:
        _monitor.progress()


def _own_connection(store: dist.Store) -> dist.Store:
    """Another connection to the same keys: one on which the main thread waits serves no one else."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))


class FailureMonitor:
    """A thread that ends this process when another one has failed, or when its own main thread is stuck.

    A main thread is stuck if it was sent SIGTERM or SIGINT and did not call `progress` in time. The thread sees signals
    for which Python has a handler even where the handler cannot run.

    To be started and stopped in the main thread; otherwise signals are not seen.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, poll: float = _POLL) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._poll = poll
        self._deadline: tuple[float, int, str] | None = None  # when, the exit status then, and why
        self._stopping = self._failing = False
        self._lock = threading.RLock()  # re-entrant: a signal handler calls progress() in the midst of progress()
        self._receiving, self._sending = socket.socketpair()
        self._earlier_wakeup: int | None = None
        self._thread = threading.Thread(target=self._watch, name="esc_arch-monitor", daemon=True)

    def start(self) -> None:
        for end in (self._receiving, self._sending):
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._earlier_wakeup = signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
            # A forked process must not report its own signals here
            os.register_at_fork(after_in_child=self._forget_signals)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        with suppress(BlockingIOError):
            self._sending.send(b"\0")
        self._thread.join()
        if self._earlier_wakeup is not None:
            signal.set_wakeup_fd(self._earlier_wakeup)
            self._earlier_wakeup = None
        self._receiving.close()
        self._sending.close()

    def fail(self, status: int, message: str) -> None:
        """Tell the others that this process ends with `status`, and make sure that it does.

        Does not return if another one failed first.
        """
        mine = json.dumps({"rank": self._rank, "status": status, "message": message})
        with suppress(RuntimeError):  # the store may be gone with its process
            if self._store.compare_set(_FAILURE, "", mine).decode() != mine:
                self._thread.join()
            self._failing = True
            until = time.monotonic() + _READING
            while self._store.add(_READERS, 0) < self._world_size - 1 and time.monotonic() < until:
                time.sleep(0.05)
        self._failing = True
        self._deadline = (time.monotonic() + _CLEANING, status, "hangs after its failure")
        atexit.register(_exit, status)

    def progress(self) -> None:
        with self._lock, suppress(OSError):
            if not self._failing:
                self._deadline = None
                self._receiving.recv(4096)  # signals that the thread has not noticed yet

    def _watch(self) -> None:
        while not self._stopping:
            if select.select([self._receiving], [], [], self._poll)[0]:
                self._note_signals()
            if self._deadline is not None and time.monotonic() > self._deadline[0]:
                _, status, reason = self._deadline
                self._end(status, f"rank {self._rank} {reason}")
            if not (self._stopping or self._failing):
                self._look_at_others()

    def _note_signals(self) -> None:
        with self._lock, suppress(BlockingIOError):  # the main thread may have taken them meanwhile
            numbers = self._receiving.recv(4096)
            for number in (signal.SIGTERM, signal.SIGINT):
                if number in numbers and self._deadline is None:
                    reason = f"made no progress for {_GRACE:g} s after {signal.Signals(number).name}"
                    self._deadline = (time.monotonic() + _GRACE, 128 + number, reason)

    def _look_at_others(self) -> None:
        try:
            if not self._store.check([_FAILURE]):
                return
            failure = json.loads(self._store.get(_FAILURE))
        except RuntimeError:
            self._end(1, "the rendezvous is lost: rank 0, or the torchrun that served it, was killed")
        if failure["rank"] != self._rank:
            self._end(failure["status"], f"rank {failure['rank']} failed: {failure['message']}", told=True)

    def _end(self, status: int, why: str, *, told: bool = False) -> NoReturn:
        print(f"{why}; stopping", file=sys.stderr, flush=True)
        if told:
            with suppress(RuntimeError):
                self._store.add(_READERS, 1)
            time.sleep(_PRECEDENCE)
        _exit(status)

    def _forget_signals(self) -> None:
        if self._earlier_wakeup is not None:
            signal.set_wakeup_fd(-1)


def _exit(status: int) -> NoReturn:
    """End this process, with the processes that load its data, whatever its other threads do."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
