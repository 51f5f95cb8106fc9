"""Tables: the four forms of one table, and where they are written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from esc_arch.errors import UserError
from esc_arch.tools.benchmark.tables import FORMATS, Cell, Column, Table, check_report, deliver

COLUMNS = [Column("name"), Column("psnr", "PSNR (dB)", ".2f"), Column("difference", style="+.1%"), "count"]
ROWS: list[list[Cell]] = [["a|b", 38.3549, -0.01, 12], ["longer", None, 0.5, "none left"]]
TABLE = Table(COLUMNS, ROWS, title="Results", notes=["One.", "Two."])


def test_text() -> None:
    assert TABLE.text().splitlines() == [
        "Results",
        "",
        "name    PSNR (dB)  difference      count",
        "------  ---------  ----------  ---------",
        "a|b         38.35       -1.0%         12",
        "longer          -      +50.0%  none left",
        "",
        "One.",
        "Two.",
    ]


def test_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "## Results",
        "",
        "| name | PSNR (dB) | difference | count |",
        "|---|---:|---:|---:|",
        r"| a\|b | 38.35 | -1.0% | 12 |",
        "| longer | - | +50.0% | none left |",
        "",
        "- One.",
        "- Two.",
    ]


def test_a_cell_stays_in_its_row_of_markdown() -> None:
    assert Table(["a"], [["x\ny"]]).markdown().splitlines()[2:] == ["| x y |"]


def test_csv_has_all_digits() -> None:
    rows = list(csv.reader(TABLE.csv().splitlines()))
    assert rows == [
        ["name", "psnr", "difference", "count"],
        ["a|b", "38.3549", "-0.01", "12"],
        ["longer", "", "0.5", "none left"],
    ]


def test_json_has_all_digits() -> None:
    assert json.loads(TABLE.json()) == [
        {"name": "a|b", "psnr": 38.3549, "difference": -0.01, "count": 12},
        {"name": "longer", "psnr": None, "difference": 0.5, "count": "none left"},
    ]


def test_json_of_what_is_not_finite_is_json() -> None:
    table = Table(["a", "b"], [[math.inf, math.nan]])
    assert json.loads(table.json(), parse_constant=pytest.fail) == [{"a": "inf", "b": "nan"}]


@pytest.mark.parametrize("form", FORMATS)
def test_each_form_ends_its_last_line(form: str) -> None:
    printed = TABLE.render(form)
    assert printed.endswith("\n")
    assert not printed.endswith("\n\n")
    assert Table(["a"], []).render(form).endswith("\n")


def test_empty_columns() -> None:
    table = Table(["a", Column("b"), "c"], [[1, None, 0], [None, None, ""]], notes=["note"])
    assert table.without_empty_columns() == Table(["a", "c"], [[1, 0], [None, ""]], notes=["note"])


def test_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"2 columns, but a row of 1 cells: \['x'\]"):
        Table(["a", "b"], [["x"]])


def test_delivery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver("é\n", None)
    assert capsys.readouterr().out == "é\n"
    report = tmp_path / "report.md"
    report.write_text("old")
    deliver("é\n", report)
    assert report.read_text(encoding="utf-8") == "é\n"
    assert list(tmp_path.iterdir()) == [report]


def test_delivery_to_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path, tmp_path / "missing" / "report.md"):
        with pytest.raises(UserError, match=r"Cannot write .*: it must be a file in a folder that is there"):
            check_report(place)
    check_report(None)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esc_arch.tools.benchmark.tables.write_atomically", full)
    with pytest.raises(UserError, match=r"Cannot write .*report\.md: No space left on device"):
        deliver("text", tmp_path / "report.md")
