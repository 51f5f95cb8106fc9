"""Tables of results for a terminal, and as Markdown, CSV and JSON."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError

__all__ = ["TABLE_FORMATS", "Cell", "Column", "Record", "Table", "add_report_arguments", "check_report", "write_report"]

TABLE_FORMATS = ("text", "markdown", "csv", "json")

#: None if there is no value; a text may say why a number is missing.
Cell = str | int | float | None
#: Cells by column names; a missing one is None.
Record = Mapping[str, Cell]


@dataclass(frozen=True)
class Column:
    """A column of a `Table`.

    Args:
        name: the key in records, CSV and JSON.
        title: heading in text and Markdown, with the unit; default: the name.
        style: format specification of numbers in text and Markdown, such as ".2f". CSV and JSON have all digits.
    """

    name: str
    title: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Records under columns, with notes below them in text and Markdown."""

    columns: Sequence[Column]
    records: Sequence[Record]
    notes: Sequence[str] = ()

    def without_empty_columns(self) -> Table:
        used = [each for each in self.columns if any(record.get(each.name) is not None for record in self.records)]
        return replace(self, columns=used)

    def render(self, form: str) -> str:
        """As one of `TABLE_FORMATS`, with a line break at its end."""
        if form == "json":
            records = [{each.name: _finite(record.get(each.name)) for each in self.columns} for record in self.records]
            return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if form == "csv":
            text = io.StringIO()
            names = [column.name for column in self.columns]
            writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records)
            return text.getvalue()
        rows = [[_shown(record.get(each.name), each.style) for each in self.columns] for record in self.records]
        rows.insert(0, [each.title or each.name for each in self.columns])
        numeric = [
            any(isinstance(record.get(each.name), int | float) for record in self.records) for each in self.columns
        ]
        lines = _markdown(rows, numeric) if form == "markdown" else _text(rows, numeric)
        bullet = "- " if form == "markdown" else ""
        notes = ["", *(bullet + note for note in self.notes)] if self.notes else []
        return "\n".join([*lines, *notes]) + "\n"


def _shown(cell: Cell, style: str) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else format(cell, style)


def _text(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _markdown(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    lines = ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "|".join("---:" if right else "---" for right in numeric) + "|", *lines[1:]]


def _finite(cell: Cell) -> Cell:
    """JSON has no infinity and no NaN: they become texts."""
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the format of a report, and the file it is written to."""
    parser.add_argument("--format", choices=TABLE_FORMATS, default="text", help="(%(default)s)")
    parser.add_argument("-o", "--report", type=Path, metavar="FILE", help="write to this file instead of printing")


def check_report(output: Path | None) -> None:
    """Check, before the work, that `write_report` can write there.

    Raises:
        UserError: it is not a file, or its folder does not exist.
    """
    if output is not None and ((output.exists() and not output.is_file()) or not output.parent.is_dir()):
        raise UserError(f"Cannot write {output}: it must be a file in an existing folder.")


def write_report(text: str, output: Path | None) -> None:
    """Print a report, or write it to a file atomically.

    Raises:
        UserError: the file cannot be written.
    """
    if output is None:
        print(text, end="")
        return
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        raise UserError(f"Cannot write {output}: {error.strerror}.") from None
