"""What systems do not share: Windows has no `fcntl` and no `resource`, and tells neither owners nor modes of files."""

from __future__ import annotations

import os
import signal
import sys
from typing import IO

if sys.platform == "win32":
    import msvcrt

    import psutil
else:
    import fcntl
    import resource

__all__ = ["block_sigint", "is_own", "lock", "memory_sizes", "peak_memory", "soft_limit"]


def lock(file: int | IO[bytes], *, wait: bool = False) -> None:
    """Lock a file, or elsewhere than on Windows a folder, until it is closed.

    BlockingIOError: another process has it, and not to `wait`. Other OSErrors: the file system has no locks.
    """
    if sys.platform == "win32":
        descriptor = file if isinstance(file, int) else file.fileno()
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte that it has not: what is locked cannot be read
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


def memory_sizes() -> tuple[int, int]:
    """The bytes of memory that this machine has, and that programs may take: half, where only Linux's files tell."""
    if sys.platform == "win32":
        return psutil.virtual_memory().total, psutil.virtual_memory().available
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # KiB elsewhere


def soft_limit(name: str) -> int | None:
    """A limit of this process, by its name in `resource`; None for none."""
    if sys.platform != "win32":
        limit = resource.getrlimit(getattr(resource, name))[0]
        return None if limit == resource.RLIM_INFINITY else limit
    return None


def block_sigint(blocked: bool) -> None:
    """Keep Ctrl-C from processes that start now, or no longer; on Windows it reaches all."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGINT})
