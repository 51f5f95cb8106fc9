"""The report as text and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from esc_arch.tools.doctor.report import PROBLEM, WARNING, Finding, as_json, as_text, size_text

FINDINGS = [
    Finding("a", "one"),
    Finding("a: b", "two", WARNING, "Fix it.", {"n": 1}),
    Finding("c", "three", PROBLEM, "Fix it."),
]


def test_text() -> None:
    """What is wrong is coloured, and the same advice is given once."""
    plain = ["- a    one", "WARNING   b  two", "    -> Fix it.", "PROBLEM c    three"]
    assert as_text(FINDINGS).splitlines() == plain
    coloured = as_text(FINDINGS, colours=True).splitlines()
    assert coloured == [plain[0], f"\033[33m{plain[1]}\033[0m", plain[2], f"\033[31m{plain[3]}\033[0m"]


def test_advice_is_given_again_behind_another_line() -> None:
    findings = [Finding("b", "", WARNING, "Fix it."), Finding("d", ""), Finding("e", "", WARNING, "Fix it.")]
    assert as_text(findings).splitlines() == ["WARNING b", "    -> Fix it.", "- d", "WARNING e", "    -> Fix it."]


def test_json() -> None:
    assert json.loads(as_json({"first": FINDINGS[:2], "second": [Finding("c", "three", PROBLEM)]})) == {
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


@pytest.mark.parametrize(("findings", "status"), [([], "ok"), (FINDINGS[:1], "ok"), (FINDINGS[:2], WARNING)])
def test_the_status_is_the_worst(findings: list[Finding], status: str) -> None:
    assert json.loads(as_json({"a": findings}))["status"] == status


def test_the_home_folder_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, link = tmp_path / "anna", tmp_path / "link"
    home.mkdir()
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    paths = [f"{link}/data and {home}/x:{home}", f"{home}-other", {str(home): [str(link)]}]
    findings = [Finding("b", str(paths[0]), data=paths), Finding("c", f"{tmp_path}")]
    text = as_text(findings)
    assert "~/data and ~/x:~" in text
    assert str(tmp_path) in text
    data = json.loads(as_json({"a": findings}))["sections"]["a"][0]["data"]
    assert data == ["~/data and ~/x:~", f"{home}-other", {"~": ["~"]}]


def test_users_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    assert as_text([Finding("a", "b /c")]).startswith("- a  b /c")


def test_a_home_that_is_the_root_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert as_text([Finding("b", "/data")]).endswith("/data")


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
