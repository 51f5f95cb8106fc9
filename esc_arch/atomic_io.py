"""Writing files so that a kill, a power cut or a full disk never leaves a half-written one under its final name."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from .errors import UserError
from .system import is_own, lock

__all__ = [
    "check_output",
    "fsync_folder",
    "locked",
    "new_folder",
    "open_regular",
    "read_regular",
    "remove",
    "remove_partial",
    "replace_folder",
    "replacing",
    "require_own_folder",
    "system_fault",
    "write_atomically",
    "write_file",
    "writing_to",
]

#: The suffix of files that are being written.
PARTIAL = ".partial"
#: Bytes of a name, of the 255 that file systems allow, that leave room for a suffix.
_LONGEST_NAME = 235

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Files that are locked. A forked process that outlives this one would keep them so.
_LOCKED: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=lambda: [file.close() for file in list(_LOCKED)])
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # (Windows has no such files)
#: Errors of the system that a user can fix, and how.
_CURES = {
    **dict.fromkeys(_NO_ROOM, "Make room there, or write elsewhere"),
    **dict.fromkeys(_NO_PERMISSION, "Get the permission for it, or use another folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "A part of this path is a file, where a folder is needed"),
    errno.ENOENT: "It, or the current folder, was removed meanwhile",
    errno.ENAMETOOLONG: "Use a shorter name",
    errno.ELOOP: "Remove the link there, which leads to itself or is not followed",
    errno.EIO: "The disk or the network that it is on fails",
    errno.ESTALE: "The network that it is on fails",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or use fewer workers",
    errno.ENFILE: "The machine has too many files open: use fewer workers",
    errno.EAGAIN: "The machine has too many processes: use fewer workers",
    errno.ENOMEM: "The memory is full: use fewer workers or smaller batches",
}


def system_fault(error: OSError) -> str | None:
    """One message for an error of the system, with the file and the cure; None for other errors."""
    if error.errno not in _CURES:
        return None
    what = str(error.strerror or error)
    if error.filename:
        what = f"{error.filename2 or error.filename}: {what}"
        if error.errno in _NO_ROOM:
            what += f" (free space there: {_free_space(Path(str(error.filename)))})"
    return f"{what}. {_CURES[error.errno]}."


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what the system says while writing to `folder` (disk full, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder}: {error}. Free space there: {_free_space(folder)}. What is finished is kept: "
            "once there is room, or the cause is fixed, the same command continues."
        ) from error


def _free_space(folder: Path) -> str:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Before any work: raise UserError if a file exists and is not to be replaced, or is a folder or in none."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists. Choose another name, or replace it with --overwrite.")
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise UserError(f"Cannot write {path}: it must be a file in an existing folder.")


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically` that raises UserError if it fails."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path`: it is always the old file or the whole new one, which is on disk when this returns."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` when the block ends, whole or not at all; `durable`: also on disk."""
    temporary, file = _new_partial(path)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if sys.platform == "win32":  # which moves no open files
                file.close()
            os.replace(temporary, path)  # while it is locked, no other process takes it for one that was left behind
        if durable:
            fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one that counts
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # what writing raises
            error.filename = str(path)
        raise


def _new_partial(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked: never one that another process writes, or that somebody put there."""
    name = path.name if len(os.fsencode(path.name)) < _LONGEST_NAME else "long"
    temporary = path.with_name(f".{name}{PARTIAL}")
    while True:
        try:
            file = open(temporary, "xb")  # noqa: SIM115  closed by the caller
        except FileExistsError:
            if not _remove_left(temporary):
                temporary = path.with_name(f".{name}.{secrets.token_hex(4)}{PARTIAL}")
            continue
        with suppress(OSError):  # a network file system without locks
            lock(file, wait=True)
        if _is_at(file, temporary):
            return temporary, file
        file.close()  # before it was locked, another process took it for one that was left behind


def _is_at(file: IO[bytes], path: Path) -> bool:
    """True if `path` still is the name of an open file; on Windows, which moves and removes none, it always is."""
    if sys.platform == "win32":
        return True
    return os.path.lexists(path) and os.path.samestat(os.fstat(file.fileno()), os.lstat(path))


def _remove_left(path: Path) -> bool:
    """Remove a file that `replacing` left when its process was killed; False if it is in use, or not ours."""
    try:
        with open_regular(path) as file:
            lock(file)
            if not is_own(os.fstat(file.fileno())):
                return False
            if sys.platform == "win32":
                file.close()
            if _is_at(file, path):  # its writer may just have moved it to its final name
                path.unlink()
            return True
    except OSError:
        return False


def remove_partial(folder: Path) -> None:
    """Remove the files that `replacing` left in `folder` when its process was killed."""
    for path in folder.glob(f".*{PARTIAL}"):
        _remove_left(path)


def open_regular(path: Path, *, create: bool = False) -> IO[bytes]:
    """Open a file to append to; OSError for links of both kinds, which may be anything, and pipes, which may wait."""
    flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if create else 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | _NO_WAIT
    file = open(path, "ab", opener=lambda name, _: os.open(name, flags, 0o666))  # noqa: SIM115  returned
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1 or path.is_symlink():
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file of one name", str(path))
    return file


def read_regular(path: str | os.PathLike[str], *, pipes: bool = False) -> bytes:
    """The contents of a file; OSError for a device, which may never end, and for a pipe, which may wait.

    Args:
        pipes: take pipes, too; one that nobody writes to is empty.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", os.fspath(path))
        if sys.platform != "win32":
            os.set_blocking(file.fileno(), True)
        return file.read()


def require_own_folder(path: Path) -> None:
    """UserError if `path`, where work in progress is kept, is there as a link or a file, or is another user's."""
    if os.path.lexists(path):
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or not is_own(state):
            raise UserError(f"{path} is in the way: it must be a folder of yours. Remove it, or choose another output.")


def replace_folder(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`, on disk, in place of what is there; if that fails, what was there stays."""
    if os.path.lexists(target) and _exchange(new, target):
        old = new
    else:
        old = target.with_name(f".{target.name}.old")
        if os.path.lexists(target):  # a kill before the next step leaves no target
            remove(old)
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            with suppress(OSError):
                os.replace(old, target)
            raise
    fsync_folder(target.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what has these two names, in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextmanager
def new_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to fill, which replaces `target` when the block ends without an error; no other process fills it.

    What was left by processes that were killed is removed.

    Args:
        check: called before `target` is replaced; raises an error if it must not be.
    """
    with ExitStack() as own:
        with _folder_lock(target.parent):
            for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}{PARTIAL}"):
                with suppress(OSError), _folder_lock(left, wait=False):
                    if is_own(left.lstat()):
                        shutil.rmtree(left)
            place = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
            place.mkdir()
            own.enter_context(_folder_lock(place))
        try:
            yield place
            with _folder_lock(target.parent):
                check()
                replace_folder(place, target)
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder itself; OSError for links, and unless `wait` for one that another process has locked."""
    if sys.platform == "win32":  # which cannot: moving a folder onto another fails there, and what was left stays
        if not wait:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(folder))
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with suppress(OSError) if wait else nullcontext():  # a network file system without locks
            lock(descriptor, wait=wait)
        yield
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk; Windows opens no folders."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove the file, link or whole folder `path`, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str = ".prepare.lock", busy: str | None = None) -> Iterator[None]:
    """Make `folder` and lock it against other processes that do the same, which get a UserError with who holds it.

    The lock file stays behind: removing it would let two processes lock different files of one name.

    Args:
        name: of the lock file.
        busy: the message; by default that of `basicsr prepare`.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open_regular(folder / name, create=True)  # closed below, when the lock is to end
    with file:
        try:
            lock(file)
            if os.fstat(file.fileno()).st_nlink == 0:  # removed, as that of a finished video, since it was opened
                raise UserError(f"Another process has just finished with {folder}. Run the command again.")
        except BlockingIOError:
            prepare = f"Another 'basicsr prepare' is writing to {folder}. Wait for it, or choose another -o."
            raise UserError(f"{busy or prepare} It is {_holder(folder / name)}.") from None
        except OSError:
            pass  # a network file system without locks
        _LOCKED.add(file)
        with suppress(OSError):  # a full disk: then nobody learns who holds it
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _holder(lock: Path) -> str:
    text = lock.read_text(errors="replace")
    return text if re.fullmatch(r"process \d+ on [\w.-]+", text) else "another process"
