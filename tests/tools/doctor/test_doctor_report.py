"""The report as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esc_arch.tools.doctor.report import OK, PROBLEM, WARNING, Finding, Report


@pytest.fixture
def report() -> Report:
    made = Report()
    made.add("first", [Finding("a", "one"), Finding("a: b", "two", WARNING, "Fix it.", {"n": 1})])
    made.add("second", [Finding("c", "three", PROBLEM)])
    return made


def test_text(report: Report) -> None:
    assert report.as_text(colours=False).splitlines() == [
        "[first]",
        "- a    one",
        "WARNING   b  two",
        "    -> Fix it.",
        "",
        "[second]",
        "PROBLEM c  three",
        "",
        "1 problem, 1 warning.",
    ]


def test_the_same_advice_is_given_once() -> None:
    report = Report()
    report.add("a", [Finding(key, "", WARNING, "Fix it.") for key in "bc"] + [Finding("d", "")])
    report.add("a", [Finding("e", "", WARNING, "Fix it.")])
    lines = report.as_text(colours=False).splitlines()
    assert lines[1:7] == ["WARNING b", "    -> Fix it.", "WARNING c", "- d", "WARNING e", "    -> Fix it."]


def test_colours_only_what_is_wrong(report: Report) -> None:
    lines = report.as_text(colours=True).splitlines()
    assert lines[1] == "- a    one"
    assert lines[2] == "\033[33mWARNING   b  two\033[0m"
    assert lines[6] == "\033[31mPROBLEM c  three\033[0m"


def test_json_has_the_same(report: Report) -> None:
    assert json.loads(report.as_json()) == {
        "format": 1,
        "status": "problem",
        "problems": 1,
        "warnings": 1,
        "sections": {
            "first": [
                {"key": "a", "status": "ok", "text": "one"},
                {"key": "a: b", "status": "warning", "text": "two", "advice": "Fix it.", "data": {"n": 1}},
            ],
            "second": [{"key": "c", "status": "problem", "text": "three"}],
        },
    }


def test_the_status_is_the_worst() -> None:
    report = Report()
    assert report.status == OK
    assert report.as_text(colours=False) == "Nothing is wrong."
    report.add("a", [Finding("a", "")])
    assert report.status == OK
    report.add("a", [Finding("b", "", WARNING), Finding("c", "")])
    assert report.status == WARNING
    assert report.as_text(colours=False).endswith("1 warning.")


def test_the_home_folder_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, link = tmp_path / "anna", tmp_path / "link"
    home.mkdir()
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    report = Report()
    paths = [f"{link}/data and {home}/x:{home}", f"{home}-other", {str(home): [str(link)]}]
    report.add("a", [Finding("b", paths[0], data=paths), Finding("c", f"{tmp_path}")])
    text = report.as_text(colours=False)
    assert "~/data and ~/x:~" in text
    assert str(tmp_path) in text
    assert json.loads(report.as_json())["sections"]["a"][0]["data"] == [
        "~/data and ~/x:~", f"{home}-other", {"~": ["~"]},
    ]  # fmt: skip


def test_numbers_that_json_does_not_have() -> None:
    report = Report()
    report.add("a", [Finding("b", "", data=[float("inf"), 1.5])])
    assert json.loads(report.as_json(), parse_constant=pytest.fail)["sections"]["a"][0]["data"] == ["inf", 1.5]


def test_a_home_that_is_the_root_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    report = Report()
    report.add("a", [Finding("b", "/data")])
    assert "/data" in report.as_text(colours=False)
