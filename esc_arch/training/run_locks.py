"""Locks on the folders that runs write to: two of one name would archive each other's, and write into the other's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import locked, system_fault
from esc_arch.errors import UserError

__all__ = ["lock_run", "run_locks"]

#: By the folder that is locked, in this process.
_held: dict[Path, AbstractContextManager[None]] = {}
_is_within = False


def lock_run(opt: dict[str, Any]) -> None:
    """Lock the folder of a run for rank 0, once, until the `run_locks` around it end, or else this process.

    UserError, with who holds it, if another process has it. The lock lies beside the folder, which is to be archived.
    """
    folder = Path(opt["path"]["experiments_root" if opt["is_train"] else "results_root"]).absolute()
    if opt["rank"] != 0 or folder in _held:
        return
    busy = (
        f"{folder} is in use by another run of the name {opt['name']}, and nothing was changed there. Wait for that "
        "run, or stop it; or give this one another name."
    )
    lock = locked(folder.parent, f".{folder.name}.lock", busy)
    try:
        lock.__enter__()
    except UserError as error:
        cause = error.__cause__  # which says more of a folder that cannot be written
        raise cause if isinstance(cause, OSError) and system_fault(cause) else error from None
    _held[folder] = lock


@contextmanager
def run_locks() -> Iterator[Iterable[Path]]:
    """Unlock at the end what was locked within, which is given; nested ones do at the end of the outer one."""
    global _is_within
    is_nested, _is_within = _is_within, True
    try:
        yield _held.keys()
    finally:
        _is_within = is_nested
        while _held and not is_nested:
            _held.popitem()[1].__exit__(None, None, None)
