"""The doctor's child process: runs functions by name, one after the other, until its standard input ends."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["describe", "serve"]

_LONGEST = 500


def serve() -> None:
    """Answer each line ``{"function": "module:name", "arguments": [...]}`` with two lines of JSON.

    The first, empty, comes when the function's module is imported; the second has the `result` or an `error`. What the
    function prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:] = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        job = json.loads(line)
        answer = _attempt(lambda job=job: {"result": _import(job["function"], answers)(*job["arguments"])})  # type: ignore[misc]
        print(json.dumps(answer, default=str), file=answers, flush=True)


def _import(name: str, answers: Any) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    print("{}", file=answers, flush=True)
    return found


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except BaseException as error:  # an exit or a panic of an extension, too, is what was looked for
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}"[:_LONGEST]
