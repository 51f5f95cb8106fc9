"""What the doctor found, as text and as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "OK", "PROBLEM", "WARNING", "Finding", "Report"]

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_SEVERITY = (OK, WARNING, PROBLEM)
_COLOURS = {WARNING: "33", PROBLEM: "31"}
#: Of the JSON; raised when a key changes its meaning.
FORMAT = 1
_WIDEST_KEY = 30


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        key: what it is about; stable, and unique within its section.
        text: what was found.
        status: `OK`, `WARNING` or `PROBLEM`.
        advice: what to do, where there is something to do.
        data: more for programs, in JSON only.
    """

    key: str
    text: str
    status: str = OK
    advice: str = ""
    data: Any = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without what it does not have."""
        found = {"key": self.key, "status": self.status, "text": self.text, "advice": self.advice, "data": self.data}
        return {name: value for name, value in found.items() if value not in ("", None)}


@dataclass
class Report:
    """Sections with their findings, in the order in which they are shown."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, section: str, findings: Iterable[Finding]) -> None:
        """Append findings to a section, which is made where it is new."""
        self.sections.setdefault(section, []).extend(findings)

    def count(self, status: str) -> int:
        """How many findings have this status."""
        return sum(finding.status == status for findings in self.sections.values() for finding in findings)

    @property
    def status(self) -> str:
        """The worst of all."""
        found = [finding.status for findings in self.sections.values() for finding in findings]
        return max(found, key=_SEVERITY.index, default=OK)

    def as_json(self) -> str:
        """Keys and their meaning are described in docs/doctor.md."""
        content = {
            "format": FORMAT,
            "status": self.status,
            "problems": self.count(PROBLEM),
            "warnings": self.count(WARNING),
            "sections": {name: [finding.as_dict() for finding in findings] for name, findings in self.sections.items()},
        }
        return json.dumps(_showable(content), indent=1, ensure_ascii=False, default=str, allow_nan=False)

    def as_text(self, *, colours: bool) -> str:
        """A line for each finding, with what to do below it, once where it is the same for several."""
        lines = []
        for name, findings in self.sections.items():
            lines.append(f"[{name}]")
            keys = _nested([finding.key for finding in findings])
            width = min(max(map(len, keys), default=0), _WIDEST_KEY)
            advice = ""
            for key, finding in zip(keys, findings, strict=True):
                mark = "-" if finding.status == OK else finding.status.upper()
                line = f"{mark} {key:<{width}}  {finding.text}".rstrip()
                lines.append(_coloured(line, finding.status) if colours else line)
                if finding.advice not in ("", advice):
                    lines.append(f"    -> {finding.advice}")
                advice = finding.advice
            lines.append("")
        lines.append(self._summary())
        return str(_showable("\n".join(lines)))

    def _summary(self) -> str:
        counts = {"problem": self.count(PROBLEM), "warning": self.count(WARNING)}
        told = ", ".join(f"{number} {what}{'s' * (number != 1)}" for what, number in counts.items() if number)
        return f"{told}." if told else "Nothing is wrong."


def _nested(keys: list[str]) -> list[str]:
    """Keys that begin with an earlier one and a colon, without it and indented."""
    shown, parent = [], ""
    for key in keys:
        if parent and key.startswith(f"{parent}: "):
            shown.append(f"  {key.removeprefix(f'{parent}: ')}")
        else:
            shown.append(key)
            parent = key
    return shown


def _coloured(line: str, status: str) -> str:
    return f"\033[{_COLOURS[status]}m{line}\033[0m" if status in _COLOURS else line


def _showable(value: Any) -> Any:
    """`value` with ~ in place of the home folder in every text in it, and what JSON has no number for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        for home in _homes():
            value = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
        return value
    if isinstance(value, dict):
        return {_showable(name): _showable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_showable(entry) for entry in value]
    return value


def _homes() -> list[str]:
    """The home folder as it is written and as links lead to it, the longer one first; none where it is the root."""
    home = Path(os.path.expanduser("~"))
    return sorted({str(path) for path in (home, home.resolve()) if len(path.parts) > 1}, key=len, reverse=True)
