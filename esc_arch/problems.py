"""What is wrong, or worth knowing, in an option file: a value to collect, to locate and to print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .printing import shown

__all__ = ["Place", "Problem", "join", "of_severity", "wrong_value"]


@dataclass(frozen=True)
class Place:
    """A place in an option file, counted from 1; or the `--force_yml` entry that set a value."""

    file: str
    line: int | None = None
    column: int | None = None
    entry: str | None = None

    def __str__(self) -> str:
        if self.entry is not None:
            return f"--force_yml {self.entry}"
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One finding about an option file.

    Attributes:
        path: the key and those of the sections above it, joined by colons; empty for the file as a whole.
        message: what was given, what is allowed, what to do.
        severity: an error must be fixed before a run; a warning is allowed but may not be meant; a note says what was
            checked and found right.
        place: where the key is, or the section that lacks it; None until the file is known.
        missing: the folder or LMDB of images that is not there, if that is the problem.
    """

    path: str
    message: str
    severity: Literal["error", "warning", "note"] = "error"
    place: Place | None = None
    missing: str | None = None

    def __str__(self) -> str:
        return shown(": ".join(part for part in (str(self.place or ""), self.path, self.message) if part))


def wrong_value(path: str, value: Any, wanted: str) -> Problem:
    """The problem of a value that is not what is wanted."""
    return Problem(path, f"{value!r} given; must be {wanted}")


def of_severity(problems: Iterable[Problem], severity: str) -> list[Problem]:
    return [problem for problem in problems if problem.severity == severity]


def join(path: str, key: str) -> str:
    """The path of a key of the section at `path`, which is empty at the top level."""
    return f"{path}:{key}" if path else key
