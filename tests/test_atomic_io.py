"""Writing files whole or not at all, where others may have put something in the way."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from esc_arch.atomic_io import (
    locked,
    new_folder,
    open_regular,
    remove_partial,
    replace_folder,
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


@pytest.fixture
def before_lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done, once, just before the next file is locked: what another process may do."""
    flock, waiting = fcntl.flock, list[Callable[[], None]]()

    def locks(*args: Any) -> None:
        if waiting:
            waiting.pop()()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", locks)
    return waiting.append


def test_a_file_that_is_taken_for_one_left_behind(tmp_path: Path, before_lock: Any) -> None:
    """Between its making and its locking."""
    with ExitStack() as other:
        before_lock(lambda: other.enter_context(replacing(tmp_path / "out.png")).write(b"half"))
        with replacing(tmp_path / "out.png") as file:
            file.write(b"whole")
        assert (tmp_path / "out.png").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_file_that_has_the_name_of_one_left_behind(tmp_path: Path, before_lock: Any) -> None:
    """The one that was opened is renamed before it is locked."""
    with ExitStack() as other, ExitStack() as third:
        other.enter_context(replacing(tmp_path / "out.png"))

        def go_on() -> None:
            other.close()
            third.enter_context(replacing(tmp_path / "out.png")).write(b"third")

        before_lock(go_on)
        remove_partial(tmp_path)
    assert (tmp_path / "out.png").read_bytes() == b"third"


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


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("kind", ["folder", "link", "none"])
def test_a_folder_replaces_another(
    kind: str, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is one step, no other is taken, at which a kill would leave nothing under the name."""
    new, target, elsewhere = tmp_path / "new", tmp_path / "out", tmp_path / "elsewhere"
    for folder in (new, elsewhere):
        folder.mkdir()
        (folder / folder.name).touch()
    if kind == "folder":
        target.mkdir()
        (target / "file").touch()
    elif kind == "link":
        target.symlink_to(elsewhere)
    if in_one_step and kind != "none":
        monkeypatch.setattr(os, "replace", None)
    elif not in_one_step:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    replace_folder(new, target)
    assert [path.name for path in target.iterdir()] == ["new"] and not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert (elsewhere / "elsewhere").exists()
