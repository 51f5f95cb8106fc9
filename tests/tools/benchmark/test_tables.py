"""Tables: the four forms of one table, and where they are written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from esc_arch.errors import UserError
from esc_arch.tools.benchmark.tables import TABLE_FORMATS, Column, Row, Table, write_report

COLUMNS = [Column("name"), Column("psnr", "PSNR (dB)", ".2f"), Column("difference", style="+.1%"), Column("count")]
RECORDS: list[Row] = [
    {"name": "a|b", "psnr": 38.3549, "difference": -0.01, "count": 12},
    {"name": "longer\nname", "difference": 0.5, "count": "none left", "unknown": 1},
]
TABLE = Table(COLUMNS, RECORDS, notes=["One.", "Two."])


def test_text() -> None:
    records = [RECORDS[0], {**RECORDS[1], "name": "longer"}]
    assert Table(COLUMNS, records, TABLE.notes).render("text").splitlines() == [
        "name    PSNR (dB)  difference      count",
        "------  ---------  ----------  ---------",
        "a|b         38.35       -1.0%         12",
        "longer          -      +50.0%  none left",
        "",
        "One.",
        "Two.",
    ]


def test_markdown() -> None:
    assert TABLE.render("markdown").splitlines() == [
        "| name | PSNR (dB) | difference | count |",
        "|---|---:|---:|---:|",
        r"| a\|b | 38.35 | -1.0% | 12 |",
        r"| longer\nname | - | +50.0% | none left |",
        "",
        "- One.",
        "- Two.",
    ]


def test_csv_and_json_have_all_digits() -> None:
    assert list(csv.reader(TABLE.render("csv").splitlines(keepends=True))) == [
        ["name", "psnr", "difference", "count"],
        ["a|b", "38.3549", "-0.01", "12"],
        ["longer\nname", "", "0.5", "none left"],
    ]
    assert json.loads(TABLE.render("json")) == [
        {"name": "a|b", "psnr": 38.3549, "difference": -0.01, "count": 12},
        {"name": "longer\nname", "psnr": None, "difference": 0.5, "count": "none left"},
    ]


def test_json_of_non_finite_numbers_is_json() -> None:
    table = Table([Column("a"), Column("b")], [{"a": math.inf, "b": math.nan}])
    assert json.loads(table.render("json"), parse_constant=pytest.fail) == [{"a": "inf", "b": "nan"}]


@pytest.mark.parametrize("form", TABLE_FORMATS)
def test_each_form_ends_its_last_line(form: str) -> None:
    for table in (TABLE, Table([Column("a")], [])):
        printed = table.render(form)
        assert printed.endswith("\n") and not printed.endswith("\n\n")


def test_empty_columns() -> None:
    table = Table([Column("a"), Column("b"), Column("c")], [{"a": 1, "c": 0}, {"b": None, "c": ""}])
    assert table.render("text").splitlines()[0] == "a  c"
    assert table.render("markdown").splitlines()[0] == "| a | c |"
    assert table.render("csv").splitlines()[0] == "a,b,c"


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report("é\n", None)
    assert capsys.readouterr().out == "é\n"
    report = tmp_path / "report.md"
    report.write_text("old")
    write_report("é\n", report)
    assert report.read_text(encoding="utf-8") == "é\n"
    assert list(tmp_path.iterdir()) == [report]


def test_reports_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esc_arch.atomic_io.write_atomically", full)
    with pytest.raises(UserError, match=r"Cannot write .*report\.md: No space left on device"):
        write_report("text", tmp_path / "report.md")
