"""Paths that the system refuses: one line for each, from every verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from esc_arch.cli import main
from esc_arch.training.run import saved_states

LONG = "n" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", f"{LONG}.pth"], f"convert: {LONG}.pth: File name too long. Use a shorter name."),
        (["prepare", "benchmark", "-i", LONG, "-o", "out"], f"prepare: {LONG}: File name too long."),
        (["prepare", "benchmark", "-i", "hr", "-o", "loop/out"], "Too many levels of symbolic links"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("hr").mkdir()
    Path("hr/a.png").touch()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "train", "test"])
def test_a_current_folder_that_is_gone(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main([verb, "-opt", str(tmp_path / "a.yml")]) == 2
    assert "the current folder, was removed meanwhile." in capsys.readouterr().err


def test_states_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Any) -> Any:  # whoever runs this may be root
        raise PermissionError(13, "Permission denied", str(path))

    assert saved_states(tmp_path / "nothing") == []
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, closed)
    with pytest.raises(PermissionError):
        saved_states(tmp_path)
