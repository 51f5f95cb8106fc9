"""What systems do not share: Windows has no `fcntl` and no `resource`, and tells neither owners nor modes of files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

if sys.platform == "win32":
    import msvcrt

    import psutil
else:
    import fcntl
    import resource

__all__ = ["free_memory", "is_own", "lock", "peak_memory", "sigint_blocked", "soft_limit", "total_memory"]

#: A byte that no file has: on Windows what is locked cannot be read.
_FAR = 2**30


def lock(file: int | IO[bytes], *, wait: bool = False) -> None:
    """Lock a file, or elsewhere than on Windows a folder, until it is closed.

    BlockingIOError: another process has it, and not to `wait`. Other OSErrors: the file system has no locks.
    """
    if sys.platform == "win32":
        descriptor = file if isinstance(file, int) else file.fileno()
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_own(state: os.stat_result) -> bool:
    """True if a file is this user's, or the system does not tell."""
    return sys.platform == "win32" or state.st_uid == os.geteuid()


def total_memory() -> int:
    """The bytes of memory that this machine has."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """The bytes of memory that programs may take; half of all on macOS, which does not tell."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().available)
    return total_memory() // 2


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # KiB elsewhere


def soft_limit(name: str) -> int | None:
    """A limit of this process, by its name in `resource`; None for none."""
    if sys.platform == "win32":
        return None
    else:
        limit = resource.getrlimit(getattr(resource, name))[0]
        return None if limit == resource.RLIM_INFINITY else limit


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Ctrl-C does not reach processes that start in this block; on Windows it does."""
    if sys.platform == "win32":
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
