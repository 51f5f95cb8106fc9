"""Ending a training from outside: the step is finished, everything saved, and the process ends by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "Stopped", "shield_worker"]

#: A second Ctrl-C within this time (seconds) is the first one again: a terminal and torchrun both send it.
_SAME_REQUEST = 2.0


class Stopped(SystemExit):
    """A training that ended because it was asked to. The exit status is the shell's for the signal: 143 or 130."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopRequest:
    """Notes SIGTERM (a scheduler's preemption) and SIGINT (Ctrl-C) while `listening`.

    Attributes:
        signum: the signal that came first; None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; elsewhere than in the main thread, where that is impossible, leave them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            again = " (Ctrl-C again: at once, without saving)" if signum == signal.SIGINT else ""
            # Not print(): the signal may have come in the middle of one
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                f"\n{signal.Signals(signum).name}: finishing the iteration, then saving{again}.\n".encode(),
            )
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            pass  # torchrun sends each signal on more than once
        elif signum == signal.SIGINT and time.monotonic() - self._since > _SAME_REQUEST:
            raise KeyboardInterrupt


def shield_worker() -> None:
    """In a process that loads data: leave signals, which schedulers and terminals send to all, to the training.

    A worker that died of one would end the step that is to be finished. The second SIGTERM is torch's, when
    a worker does not end by itself, and is obeyed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
