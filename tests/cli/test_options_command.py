"""`basicsr options`: the shipped option files, listed, printed and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from esc_arch.cli import main, options

ROOT = Path(__file__).parents[2]


def test_list_names_every_file_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in sorted((ROOT / "options").glob("*.yml"))]
    assert all(len(line.split()) > 3 for line in lines)


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "show", "train_ESC_x4.yml"]) == 0
    assert capsys.readouterr().out == (ROOT / "options" / "train_ESC_x4.yml").read_text(encoding="utf-8")


def test_copy(work_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = (ROOT / "options" / "train_ESC_x4.yml").read_bytes()
    assert main(["options", "copy", "train_ESC_x4"]) == 0
    assert main(["options", "copy", "train_ESC_x4", "-o", "new/my.yml"]) == 0
    assert main(["options", "copy", "train_ESC_x4", "test_ESC_x4", "-o", "folder"]) == 0
    for path in ("train_ESC_x4.yml", "new/my.yml", "folder/train_ESC_x4.yml"):
        assert Path(path).read_bytes() == file
    Path("train_ESC_x4.yml").write_text("mine", encoding="utf-8")
    assert main(["options", "copy", "train_ESC_x4"]) == 2
    assert Path("train_ESC_x4.yml").read_text(encoding="utf-8") == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert main(["options", "copy", "train_ESC_x4", "--overwrite"]) == 0
    assert Path("train_ESC_x4.yml").read_bytes() == file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show train_ESC_X4x", "Did you mean train_ESC_x4?"),
        ("copy nothing", "`basicsr options list` lists all."),
        ("copy train_ESC_x2 train_ESC_x3 -o one.yml", "-o FOLDER"),
        ("copy train_ESC_x2 -o file/x.yml", "Cannot write file/x.yml"),
    ],
)
def test_mistakes(work_folder: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert main(["options", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_an_installed_wheel_has_them_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "option_files").mkdir()
    (tmp_path / "option_files" / "train_X.yml").touch()
    monkeypatch.setattr(options, "_PACKAGE", tmp_path)
    assert [*options.option_files()] == ["train_X"]
