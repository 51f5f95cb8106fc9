"""The user's cache. Libraries from it are run, so nothing is taken from it that another user may have written."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from esc_arch.atomic_io import replacing
from esc_arch.system import is_own

__all__ = ["cache_folder", "own_folder", "read", "write"]

_WRITABLE_BY_OTHERS = 0 if sys.platform == "win32" else stat.S_IWGRP | stat.S_IWOTH  # has no modes


def cache_folder() -> Path:
    """The folder, which need not be there yet; in that for temporary files where the user has no home."""
    named, home = Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~"))
    if named.is_absolute():  # or it is to be ignored, as the XDG specification says
        return named / "esc_arch"
    if home.is_absolute():
        return home / ".cache" / "esc_arch"
    temporary = Path(tempfile.gettempdir()).absolute()
    if sys.platform == "win32":
        return temporary / "esc_arch"
    return temporary / f"esc_arch-{os.geteuid()}"


def read(path: Path) -> bytes:
    """The contents of a file in the cache; OSError where it cannot be read, or other users may have written it."""
    _require_own(path)
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    """Write a file in the cache, whole or not at all, for this user alone."""
    own_folder(path.parent)
    with replacing(path) as file:
        if sys.platform != "win32":
            os.fchmod(file.fileno(), 0o600)
        file.write(data)


def own_folder(folder: Path) -> Path:
    """A folder in the cache, made if need be; OSError where that fails, or other users may write to it."""
    for each in (*reversed(folder.parents), folder):
        if not os.path.lexists(each):
            each.mkdir(mode=0o700, exist_ok=True)
        elif each.is_relative_to(cache_folder()):
            state = each.lstat()
            if stat.S_ISDIR(state.st_mode) and is_own(state) and state.st_mode & _WRITABLE_BY_OTHERS:
                each.chmod(0o700)  # what others put there belongs to them, and is not read
    _require_own(folder)
    return folder


def _require_own(path: Path) -> None:
    """PermissionError if other users may write `path`, or put another in its place."""
    root = os.stat("/").st_uid  # (which has another number in some containers)
    for each in (path, *path.parents, *path.resolve().parents):
        state, inside = each.lstat(), each.is_relative_to(cache_folder())
        link = stat.S_ISLNK(state.st_mode)
        if not is_own(state) and (inside or state.st_uid != root):
            what = f"belongs to another user (uid {state.st_uid})"
        elif link and inside:
            what = "is a link"
        elif state.st_mode & _WRITABLE_BY_OTHERS and not link and (inside or not state.st_mode & stat.S_ISVTX):
            what = "can be written by other users"
        else:
            continue
        raise PermissionError(
            f"{each} {what}, so nothing is taken from the cache. Remove it or change its mode (chmod go-w), or set "
            "XDG_CACHE_HOME to a folder that only you can write"
        )
