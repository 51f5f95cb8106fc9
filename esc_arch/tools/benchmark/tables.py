"""Tables of results for a terminal, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError

__all__ = ["FORMATS", "Cell", "Column", "Table", "check_report", "deliver"]

#: What `Table.render` knows.
FORMATS = ("text", "markdown", "csv", "json")

#: None is for what there is no figure of; a text may stand in place of a number to say why.
Cell = str | int | float | None

_NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column of a `Table`.

    Args:
        name: in CSV and JSON.
        title: in text and Markdown, with the unit; without one, the name.
        style: how numbers are written in text and Markdown, as in `format()`, such as ".2f" or "+.1%". CSV and JSON
            have all digits.
    """

    name: str
    title: str = ""
    style: str = ""

    @property
    def heading(self) -> str:
        return self.title or self.name

    def show(self, cell: Cell) -> str:
        """A cell in text and Markdown."""
        if cell is None:
            return _NOTHING
        return cell if isinstance(cell, str) else format(cell, self.style)


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; a column given by its name alone has plain numbers.

    Args:
        columns: `Column`s or names.
        rows: for each column a cell.
        title: above it in text and Markdown.
        notes: lines below it in text and Markdown.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, but a row of {len(row)} cells: {row}.")

    def without_empty_columns(self) -> Table:
        """The same without the columns that have nothing in any row."""
        kept = [place for place in range(len(self.columns)) if any(row[place] is not None for row in self.rows)]
        columns = [self.columns[place] for place in kept]
        return replace(self, columns=columns, rows=[[row[place] for place in kept] for row in self.rows])

    def render(self, form: str) -> str:
        """As one of `FORMATS`, with a line break at its end."""
        return {"text": self.text, "markdown": self.markdown, "csv": self.csv, "json": self.json}[form]()

    def text(self) -> str:
        """For a terminal: columns in line, numbers to the right."""
        cells, to_the_right = self._shown(), self._to_the_right()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, to_the_right, strict=True)
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*([self.title, ""] if self.title else []), *lines, *self._below()]) + "\n"

    def markdown(self) -> str:
        """As a table of GitHub's Markdown, with the title as a heading of the second level."""
        lines = [
            "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |"
            for row in self._shown()
        ]
        lines.insert(1, "|" + "|".join("---:" if right else "---" for right in self._to_the_right()) + "|")
        return "\n".join([*([f"## {self.title}", ""] if self.title else []), *lines, *self._below("- ")]) + "\n"

    def csv(self) -> str:
        """As CSV (RFC 4180, but for line breaks of \\n alone) with a line of names; None is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(column.name for column in self._columns())
        writer.writerows(self.rows)
        return text.getvalue()

    def json(self) -> str:
        """As a JSON list with an object for each row; what is not finite, which JSON has no number for, is a text."""
        return json.dumps(self.records(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def records(self) -> list[dict[str, Cell]]:
        """The rows as dictionaries, to be made JSON."""
        names = [column.name for column in self._columns()]
        return [dict(zip(names, map(_finite, row), strict=True)) for row in self.rows]

    def _columns(self) -> list[Column]:
        return [Column(column) if isinstance(column, str) else column for column in self.columns]

    def _shown(self) -> list[list[str]]:
        columns = self._columns()
        rows = ([column.show(cell) for column, cell in zip(columns, row, strict=True)] for row in self.rows)
        return [[column.heading for column in columns], *rows]

    def _to_the_right(self) -> list[bool]:
        return [any(isinstance(row[place], int | float) for row in self.rows) for place in range(len(self.columns))]

    def _below(self, bullet: str = "") -> list[str]:
        return ["", *(f"{bullet}{note}" for note in self.notes)] if self.notes else []


def deliver(text: str, output: Path | None) -> None:
    """Print a report, or write it to a file in place of what is there; the file is there in full or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    if output is None:
        print(text, end="")
        return
    check_report(output)
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        raise UserError(f"Cannot write {output}: {error.strerror}.") from None


def check_report(output: Path | None) -> None:
    """See to it before the work that `deliver` can write there.

    Raises:
        UserError: it is no file, or its folder is not there.
    """
    if output is not None and ((output.exists() and not output.is_file()) or not output.parent.is_dir()):
        raise UserError(f"Cannot write {output}: it must be a file in a folder that is there.")


def _finite(cell: Cell) -> Cell:
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell
