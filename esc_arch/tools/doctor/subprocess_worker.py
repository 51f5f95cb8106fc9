"""Calls of functions that may crash or hang, in a child process."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["JobFailed", "Worker", "describe"]

_LONGEST = 500
#: Seconds for the import of a call's module: torch alone takes a minute from a slow network disk.
_IMPORT_LIMIT = 180.0


class JobFailed(Exception):
    """A call raised, or its process crashed or took too long (`late`)."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Worker:
    """A child process for one call after another, started when it is needed and again after a crash.

    Args:
        timeout: seconds for each call, without the import of its module.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, function: str, *arguments: Any) -> Any:
        """Return what ``module:name`` does; JobFailed: it raised, crashed or took too long."""
        if self._process is None:
            self._connection, child = get_context("spawn").Pipe()
            self._process = get_context("spawn").Process(target=_serve, args=(child,))
            self._process.start()
            child.close()
        try:
            self._connection.send((function, arguments))
            for seconds in (_IMPORT_LIMIT, self.timeout):
                if not self._connection.poll(seconds):
                    self.stop()
                    raise JobFailed(f"not finished after {seconds:g} s of running", late=True)
                error, result = self._connection.recv()
                if error:
                    raise JobFailed(error)
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            raise JobFailed(f"the process ended with {cause}") from None
        return result

    def stop(self) -> None:
        """Kill the process, and compilers that it started."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            if sys.platform != "win32":
                with suppress(OSError):  # all have ended
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _serve(calls: Connection) -> None:
    if sys.platform != "win32":
        os.setsid()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.dup2(2, 1)  # what libraries print is not the report
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA without a GPU
    with suppress(EOFError):
        while True:
            function, arguments = calls.recv()
            module, _, name = function.partition(":")
            try:
                call = getattr(importlib.import_module(module), name)
                calls.send((None, None))
                calls.send((None, call(*arguments)))
            except BaseException as error:  # also SystemExit and an extension's panic
                calls.send((describe(error), None))


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:_LONGEST]
