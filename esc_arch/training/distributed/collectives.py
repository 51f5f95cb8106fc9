"""Small agreements among the processes of a run, made on their CPUs.

They have a process group of their own, of gloo, beside the one that carries gradients: the GPUs need not be waited for,
and a wait may last. NCCL would end a run in which one process validates for longer than its timeout (fault 18), while
gloo notices at once when a process dies.

Without a process group a process agrees with itself. All functions raise RuntimeError when another process is gone.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Agreement", "close_control_group", "gather_objects", "open_control_group", "wait_for_all"]

#: Longer than any validation, but finite.
_TIMEOUT = timedelta(days=1)
#: Seconds between two checks for the other processes.
_POLL = 0.02

_group: Any = None


def open_control_group() -> None:
    """Make the group; every process of the default group has to."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_TIMEOUT)


def close_control_group() -> None:
    """Forget the group, which `torch.distributed.destroy_process_group` ends."""
    global _group
    _group = None


class Agreement:
    """Asks once per iteration if any process wants something, without anyone waiting."""

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None

    def any_rank(self, flag: bool) -> bool:
        """True if any process gave a true `flag` in the call before: at the same call for all; False at the first.

        The answer to this call is on its way meanwhile. A process that is alone has it at once.
        """
        if _group is None:
            return flag
        answer = False
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            answer = bool(flags)
        flags = torch.tensor([flag], dtype=torch.uint8)
        self._pending = dist.all_reduce(flags, dist.ReduceOp.MAX, group=_group, async_op=True), flags
        return answer


def gather_objects(obj: Any) -> list[Any]:
    """The `obj` of every process, in the order of their ranks, for every process; anything that can be pickled."""
    if _group is None:
        return [obj]
    wait_for_all()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj, group=_group)
    return gathered


def wait_for_all() -> None:
    """Wait, for up to a day, until all processes are here; signals are handled meanwhile."""
    if _group is None:
        return
    work = dist.barrier(group=_group, async_op=True)
    while not work.is_completed():  # wait() would keep Python's signal handlers from running
        time.sleep(_POLL)
    work.wait()
