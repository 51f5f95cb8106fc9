"""Tables of results for a terminal, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esc_arch.atomic_io import write_file
from esc_arch.printing import shown

__all__ = ["TABLE_FORMATS", "Cell", "Column", "Row", "Table", "write_report"]

TABLE_FORMATS = ("text", "markdown", "csv", "json")

#: None if there is no value; a text may say why a number is missing.
Cell = str | int | float | None
#: Cells by column names; a missing one is None.
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Column:
    """A column of a `Table`: its name in records, CSV and JSON, and how text and Markdown show it.

    They have `title` (default: the name) as the heading, and numbers in the format `style`; CSV and JSON all digits.
    """

    name: str
    title: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Records under columns, with notes below them in text and Markdown, where empty columns are left out."""

    columns: Sequence[Column]
    records: Sequence[Row]
    notes: Sequence[str] = ()

    def render(self, form: str) -> str:
        """As one of `TABLE_FORMATS`, with a line break at its end."""
        names = [column.name for column in self.columns]
        if form == "json":
            records = [{name: _finite(record.get(name)) for name in names} for record in self.records]
            return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if form == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records)
            return text.getvalue()
        columns, numeric = [], []
        for column in self.columns:
            cells = [record.get(column.name) for record in self.records]
            if not cells or any(cell is not None for cell in cells):
                numeric.append(any(isinstance(cell, int | float) for cell in cells))
                columns.append([column.title or column.name, *(_text(cell, column.style) for cell in cells)])
        if form == "markdown":
            columns = [[" ".join(cell.replace("|", r"\|").split()) for cell in column] for column in columns]
            rule = f"|{'|'.join('---:' if right else '---' for right in numeric)}|"
            heading, *lines = (f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
            notes = [f"- {note}" for note in self.notes]
        else:
            widths = [max(map(len, column)) for column in columns]
            aligned = [f"{'>' if right else '<'}{width}" for width, right in zip(widths, numeric, strict=True)]
            rule = "  ".join("-" * width for width in widths)
            heading, *lines = ("  ".join(map(format, row, aligned)).rstrip() for row in zip(*columns, strict=True))
            notes = [*map(shown, self.notes)]
        return "\n".join([heading, rule, *lines, *([""] if notes else []), *notes]) + "\n"


def _text(cell: Cell, style: str) -> str:
    if cell is None:
        return "-"
    return shown(cell) if isinstance(cell, str) else format(cell, style)


def _finite(cell: Cell) -> Cell:
    """JSON has no infinity and no NaN: they become texts."""
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def write_report(text: str, output: Path | None) -> None:
    """Print a report, or write it to a file atomically; raises UserError if that fails."""
    if output is None:
        print(text, end="")
    else:
        write_file(output, text.encode())
