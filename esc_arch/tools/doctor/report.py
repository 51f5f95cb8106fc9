"""What the doctor's checks take and give, and the report as text and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from esc_arch.printing import shown

from .subprocess_worker import JobFailed, Worker

__all__ = ["OK", "PROBLEM", "WARNING", "Context", "Finding", "as_json", "as_text", "size_text", "warn_if"]

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_COLOURS = {WARNING: "\033[33m", PROBLEM: "\033[31m"}
#: Raised when a key changes its meaning.
_JSON_FORMAT = 1
_WIDEST_KEY = 30


class Finding(NamedTuple):
    """A line of the report; `key` is unique within its section, `data` is for JSON only."""

    key: str
    text: str
    status: str = OK
    advice: str = ""
    data: Any = None


def warn_if(condition: object, key: str, text: str, advice: str, data: Any = None) -> Finding:
    """A warning with advice under a condition, otherwise neither."""
    return Finding(key, text, WARNING, advice, data) if condition else Finding(key, text, data=data)


class Context(NamedTuple):
    """What sections share: the command's arguments, why BasicSR cannot be imported ("": it can), and a worker."""

    args: argparse.Namespace
    import_failure: str
    worker: Worker

    def in_child(
        self, key: str, function: str, *arguments: Any, status: str = PROBLEM, advice: str = "Report this."
    ) -> Iterator[Finding]:
        """The findings of a function of this package, called in the child process as ``module:name``.

        If it fails, a finding about that with this key, status and advice.
        """
        try:
            found = self.worker.call(f"{__package__}.{function}", *arguments)
        except JobFailed as failure:
            advice = "It may still be at work: try a longer --timeout." if failure.late else advice
            found = [(key, str(failure), status, advice)]
        yield from (Finding(*each) for each in found)


def as_json(sections: Mapping[str, Sequence[Finding]]) -> str:
    """The report for programs; docs/doctor.md describes the keys."""
    statuses = [finding.status for findings in sections.values() for finding in findings]
    content = {
        "format": _JSON_FORMAT,
        "status": next((status for status in (PROBLEM, WARNING) if status in statuses), OK),
        "problems": statuses.count(PROBLEM),
        "warnings": statuses.count(WARNING),
        "sections": {
            name: [
                {key: value for key, value in each._asdict().items() if value not in ("", None)} for each in findings
            ]
            for name, findings in sections.items()
        },
    }
    return _hide_home(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def as_text(findings: Sequence[Finding], *, colours: bool = False) -> str:
    """A line for each finding, followed by its advice unless the line before has the same.

    A key that begins with that of a line before and a colon is indented, without it.
    """
    keys: list[str] = []
    parent = ""
    for key in (finding.key for finding in findings):
        below = key.removeprefix(f"{parent}: ")
        parent = key if below == key else parent
        keys.append(key if below == key else f"  {below}")
    width = min(max(map(len, keys), default=0), _WIDEST_KEY)
    lines, advice = [], ""
    for key, finding in zip(keys, findings, strict=True):
        mark = "-" if finding.status == OK else finding.status.upper()
        line = shown(f"{mark} {key:<{width}}  {finding.text}".rstrip())
        lines.append(f"{_COLOURS[finding.status]}{line}\033[0m" if colours and mark != "-" else line)
        if finding.advice not in ("", advice):
            lines.append(f"    -> {finding.advice}")
        advice = finding.advice
    return _hide_home("\n".join(lines))


def _hide_home(text: str) -> str:
    """`text` with ~ in place of the home folder, as it is written and as links lead to it; not if it is the root."""
    home = os.path.expanduser("~")
    for path in sorted({home, os.path.realpath(home)} - {"/"}, key=len, reverse=True):
        text = re.sub(rf"{re.escape(path)}(?![\w.-])", "~", text)
    return text


def size_text(size: float) -> str:
    """Bytes as text, such as 1.5 GiB."""
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((f"{size / of:.1f} {unit}" for unit, of in units if size >= of), f"{size:.0f} bytes")
