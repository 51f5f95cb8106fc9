"""When one process of a run fails, all end at once, with its message; when none does, all end in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .collectives import close_control_group, wait_for_all
from .failure_monitor import current_watcher, stop_watcher

__all__ = ["abort_all_ranks"]


@contextmanager
def abort_all_ranks(describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """Around everything that a process does in a run; `init_dist` is called inside.

    Left normally or by SystemExit, which all processes have to do: waits for the others, then ends the watcher and the
    process group. By another exception: tells the others, which end within about two seconds, and lets it pass, to be
    printed before the process exits. The rest of Python's exit is skipped then, where a process group that waits for
    dead peers would hang or abort. If another process failed before, this exception is taken for a consequence, and the
    process ends with the other's message.

    Args:
        describe: the exit status and the message for an exception.
    """
    ended: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as end:
            ended = end
        _leave_in_order()
    except (Exception, KeyboardInterrupt) as error:
        watcher = current_watcher()
        if watcher is not None:
            watcher.fail(*describe(error))
        raise
    if ended is not None:
        raise ended


def _leave_in_order() -> None:
    wait_for_all()  # until then the others need the store, which may end with this process
    stop_watcher()
    close_control_group()
    if dist.is_initialized():
        dist.destroy_process_group()
