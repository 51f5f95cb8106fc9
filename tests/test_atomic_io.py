"""Writing files whole or not at all, where others may have put something in the way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from esc_arch.atomic_io import (
    locked,
    new_folder,
    open_regular,
    remove_partial,
    replacing,
    require_own_folder,
    write_atomically,
)
from esc_arch.errors import UserError


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_was_planted_is_left_alone(kind: str, tmp_path: Path) -> None:
    victim, planted, target = tmp_path / "victim", tmp_path / ".out.png.partial", tmp_path / "out.png"
    victim.write_text("precious")
    if kind == "folder":
        planted.mkdir()
        (planted / "precious").touch()
    elif kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(victim if kind == "link" else tmp_path / "none")
    write_atomically(target, b"new")
    remove_partial(tmp_path)
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert victim.read_text() == "precious" and not (tmp_path / "none").exists()
    assert os.path.lexists(planted) and (kind != "folder" or (planted / "precious").exists())
    assert len(list(tmp_path.iterdir())) == 3


def test_two_writers_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    with replacing(target) as first:
        first.write(b"first")
        with replacing(target) as second:
            second.write(b"second")
        assert target.read_bytes() == b"second"
        remove_partial(tmp_path)  # what is in use stays
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_another_process_took_for_one_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, flock, calls = tmp_path / ".out.png.partial", fcntl.flock, []

    def late(*arguments: Any) -> None:  # before ours is locked, the other one removes it and makes its own
        if not calls:
            theirs.unlink()
            theirs.touch()
            calls.append(theirs.open("ab"))
            flock(calls[0], fcntl.LOCK_EX)
            calls[0].write(b"half")
            calls[0].flush()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(tmp_path / "out.png", b"whole")
    assert (tmp_path / "out.png").read_bytes() == b"whole" and theirs.read_bytes() == b"half"
    calls[0].close()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.png.partial"
    left.write_bytes(b"half")
    remove_partial(tmp_path)
    assert not left.exists()
    left.write_bytes(b"half")
    write_atomically(tmp_path / "out.png", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_name_that_leaves_no_room_for_a_suffix(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 125 + ".png")
    write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_lock_that_was_planted(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="lock"), locked(tmp_path, "lock"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / "second name").hardlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="second name"), locked(tmp_path, "second name"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        open_regular(tmp_path / "pipe")


def test_a_lock_is_of_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path, "lock"):
        with open(tmp_path / "lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="busy with it"), locked(tmp_path, "lock", "busy with it"):
            pass
    with locked(tmp_path, "lock"):
        pass


def test_folders_of_work_in_progress(tmp_path: Path) -> None:
    require_own_folder(tmp_path / "none")
    require_own_folder(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"link is in the way: it must be a folder of yours"):
        require_own_folder(tmp_path / "link")


def test_two_that_fill_a_folder(tmp_path: Path) -> None:
    """Each its own; the last replaces the others, unless its check says otherwise."""
    target, check = tmp_path / "out", lambda: None
    with new_folder(target, check) as first:
        (first / "first").touch()
        with new_folder(target, check) as second:
            (second / "second").touch()
            assert first.is_dir()
        assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in target.iterdir()] == ["first"]

    def refuse() -> None:
        raise UserError("it is there")

    with pytest.raises(UserError, match="it is there"), new_folder(target, refuse):
        pass
    assert [path.name for path in target.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [target]


def test_folders_that_killed_processes_left(tmp_path: Path) -> None:
    left, kept = tmp_path / ".out.0123abcd.partial", tmp_path / ".out.partial"
    link = tmp_path / ".out.01234567.partial"
    for folder in (left, kept):
        folder.mkdir()
        (folder / "file").touch()
    link.symlink_to(kept)
    with new_folder(tmp_path / "out", lambda: None):
        assert not left.exists() and (kept / "file").exists() and link.is_symlink()
