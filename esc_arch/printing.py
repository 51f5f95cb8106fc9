"""Printing what comes from files, on terminals that would obey it and streams that cannot take it or have gone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

__all__ = ["OutputStream", "escape_record", "is_utf8", "safe_streams", "shown"]

#: What progress bars and reports send to a terminal: colours, and the cursor to the line above.
_OWN_SEQUENCES = re.compile(r"(\x1b\[(?:[0-9;]*m|A))")


def shown(text: object) -> str:
    """Names and values as messages have them: on one line, and nothing in it that a terminal would obey."""
    return _escape(str(text))


def _escape(text: str, keep: str = "") -> str:
    """`text` with escapes for controls of the terminal and of the direction of writing, and for lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep or unicodedata.category(each) == "Zs" else ascii(each)[1:-1]
        for each in text
    )


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """True if other languages' libraries can be given the path, too."""
    return not re.search("[\ud800-\udfff]", os.fspath(path))


def escape_record(record: logging.LogRecord) -> bool:
    """A filter for logs: each argument stays within its line."""
    if isinstance(record.args, tuple):
        record.args = tuple(shown(each) if isinstance(each, str | PurePath) else each for each in record.args)
    record.msg = _escape(str(record.msg), keep="\n\t")
    return True


class OutputStream:
    """A standard stream that prints any text as far as its encoding goes, and whose failures end no run.

    What is written after a failure goes nowhere.

    Attributes:
        failure: the first one.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        parts = _OWN_SEQUENCES.split(text) if self._stream.isatty() else [text]
        safe = "".join(part if index % 2 else _escape(part, keep="\n\r\t") for index, part in enumerate(parts))
        encoding = self._stream.encoding or "utf-8"
        self._try(self._stream.write, safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except OSError as error:
            self.failure = self.failure or error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # for what the stream still holds, too
            os.close(null)


@contextlib.contextmanager
def safe_streams() -> Iterator[OutputStream]:
    """While this lasts, stdout (which is returned) and stderr are there, and print as `OutputStream` does."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file opened next would get what is printed
        os.set_inheritable(null, True)
    os.close(null)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        sys.stdout, sys.stderr = output, _ = OutputStream(sys.stdout or nothing), OutputStream(sys.stderr or nothing)
        try:
            yield output
        finally:
            sys.stdout, sys.stderr = before
