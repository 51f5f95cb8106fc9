"""Work that may crash or hang, done in a child process."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["JobFailed", "Worker", "import_failure"]

#: Seconds for a job's imports: torch alone takes a minute from a slow network disk.
_IMPORT_LIMIT = 180.0
_LONGEST_TAIL = 300


class JobFailed(Exception):
    """What a job did instead of returning; the message goes into the report.

    Attributes:
        crashed: the process ended.
        late: it was still at work when the time was over.
    """

    def __init__(self, message: str, *, crashed: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.crashed, self.late = crashed, late


class Worker:
    """A child process that calls functions of `esc_arch.tools.doctor`, started when needed and after a crash.

    Args:
        timeout: seconds that a call may take, without its imports.
        environment: what is set beside this process's environment.
    """

    def __init__(self, timeout: float, **environment: str) -> None:
        self.timeout = timeout
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of ``module:name`` for arguments that JSON has.

        Raises:
            JobFailed: it raised, crashed, or took too long.
        """
        if self._process is None:
            self._start()
        self._send({"function": function, "arguments": arguments})
        answer = self._receive(_IMPORT_LIMIT, "importing")
        if not answer:
            answer = self._receive(self.timeout, "running")
        if "error" in answer:
            raise JobFailed(answer["error"])
        return answer["result"]

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent), "jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | self._environment,
            start_new_session=True,
        )
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        self._send(sys.path)

    def _send(self, content: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is seen when it does not answer
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _receive(self, limit: float, doing: str) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.stop(patience=0)
            raise JobFailed(f"not finished after {limit:g} s of {doing}", late=True) from None
        if not line:
            raise JobFailed(self.stop(), crashed=True)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self, patience: float = 5) -> str:
        """End the process and what it started, until the next call; returns how it had ended."""
        process, self._process = self._process, None
        if process is None or self._errors is None:
            return ""
        with suppress(subprocess.TimeoutExpired, OSError):
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=patience)
        _kill(process)
        process.wait()
        with self._errors as file:
            file.seek(0)
            return _how_it_ended(process.returncode, file.read().decode("utf-8", "replace"))


def _read(stream: IO[str], answers: queue.Queue[str]) -> None:
    for line in stream:
        answers.put(line)
    answers.put("")


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started, too
        else:
            process.kill()


def import_failure(module: str) -> str:
    """Why a process of its own cannot import a module, in one line; empty when it can."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace")
    return _how_it_ended(done.returncode, done.stderr) if done.returncode else ""


def _how_it_ended(status: int, said: str) -> str:
    lines = said.strip().splitlines()
    tail = f" ({lines[-1].strip()[:_LONGEST_TAIL]})" if lines else ""
    return f"the process ended with {_cause(status)}{tail}"


def _cause(status: int) -> str:
    with suppress(ValueError):
        if status < 0:
            return f"signal {signal.Signals(-status).name}"
    return f"status {status}"
