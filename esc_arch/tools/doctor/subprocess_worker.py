"""Calls of functions that may crash or hang, in a child process; needs the standard library alone."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO, Any

__all__ = ["IMPORT_LIMIT", "JobFailed", "Worker", "describe", "how_it_ended", "serve"]

_LONGEST = 500
#: Seconds for imports before a call: torch alone takes a minute from a slow network disk.
IMPORT_LIMIT = 180.0


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
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, function: str, *arguments: Any) -> Any:
        """Return what ``module:name`` does, of what JSON can hold; JobFailed: it raised, crashed or took too long."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps([function, arguments, self.timeout]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            self.stop()
            if process.returncode == -signal.SIGALRM:
                raise JobFailed(f"not finished after {self.timeout:g} s of running", late=True)
            self._errors.seek(0)
            raise JobFailed(how_it_ended(process.returncode, self._errors.read()))
        answer = json.loads(line)
        if "error" in answer:
            raise JobFailed(answer["error"])
        return answer["result"]

    def _start(self) -> subprocess.Popen[str]:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            start_new_session=True,
        )

    def stop(self) -> None:
        """Kill the process, and compilers that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def serve() -> None:
    """Answer each line of standard input, ``["module:name", arguments, seconds]``, with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        function, arguments, seconds = json.loads(line)
        module, _, name = function.partition(":")
        try:
            signal.setitimer(signal.ITIMER_REAL, IMPORT_LIMIT)  # SIGALRM ends the process, whatever it is doing
            call = getattr(importlib.import_module(module), name)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = {"result": call(*arguments)}
        except BaseException as error:  # also SystemExit and an extension's panic
            answer = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer, default=str), file=answers, flush=True)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:_LONGEST]


def how_it_ended(status: int, said: bytes) -> str:
    """The exit status or signal of a process, and the last line of its standard error."""
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"the process ended with {cause}{f' ({last[:_LONGEST]})' if last else ''}"
