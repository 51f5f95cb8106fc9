"""Paths that the system refuses: one line for each, from every verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from esc_arch.atomic_io import read_regular
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


@pytest.mark.parametrize(
    ("pipe", "arguments", "message"),
    [
        ("a.yml", ["check", "-opt", "a.yml"], "option file a.yml is empty."),
        ("costs", ["benchmark", "quality", "-opt", "b.yml", "--cost", "costs"], "--cost costs cannot be used"),
        ("hr/b.png", ["prepare", "benchmark", "-i", "hr", "-o", "out"], "hr/b.png is no file, but a pipe"),
        ("out/prepare.json", ["prepare", "benchmark", "-i", "hr", "-o", "out"], "prepare.json was not written by"),
        (
            "out/.T_HR_sub.lmdb.partial/prepare.json",
            ["prepare", "train", "-i", "hr", "-o", "out", "--name", "T"],
            "a.png",
        ),
    ],
)
def test_pipes_are_not_waited_for(
    pipe: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hr").mkdir()
    Path("hr/a.png").touch()
    Path(pipe).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(pipe)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_option_files_may_come_from_pipes(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"name: a\n")
    os.close(writing)
    assert read_regular(f"/dev/fd/{reading}", pipes=True) == b"name: a\n"
    os.close(reading)
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="pipe or a device"):
            read_regular(name, pipes=True)


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
