"""Apply cached autotune results of this machine's GPU to `auto`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

from .files import load
from .verdicts import Subject

__all__ = ["auto_skip_reasons", "forget"]

logger = logging.getLogger(__name__)


def forget() -> None:
    """Read the files again: they have changed."""
    load.cache_clear()
    _reasons.cache_clear()


def auto_skip_reasons(subject: Subject, device: str, index: int | None, rivals: Sequence[str] = ()) -> list[str]:
    """Why `auto` does not take a backend that can run; empty where its trial says that it is exact and faster.

    Args:
        subject: what is to be computed, and by which backend.
        device, index: type and number of the device that the inputs are on.
        rivals: other backends with trials that can take the same inputs and come later in `auto`'s order.
    """
    if device == "cpu":
        return ["on a CPU its kernels are interpreted, for tests alone"]
    switch = os.environ.get("ESC_ARCH_TRITON")
    if switch == "1":
        return []
    if switch == "0":
        return ["ESC_ARCH_TRITON=0 keeps auto from it"]
    return list(_reasons(subject, device, index, tuple(rivals)))


@cache
def _reasons(subject: Subject, device: str, index: int | None, rivals: tuple[str, ...]) -> tuple[str, ...]:
    loaded = load(device, index)
    verdict = loaded.verdicts.get(subject)
    if loaded.problem:
        return (f"what its trial found is not known, {loaded.problem}: `basicsr warmup` tries it again",)
    if verdict is None:
        if not loaded.verdicts:
            _advise()
        return ("not tried on this GPU yet: `basicsr warmup` tries it",)
    if verdict.failure:
        return (f"failed its trial on this GPU: {verdict.failure}; `basicsr warmup --again` tries it again",)
    if verdict.slower:
        return (verdict.slower,)
    for name in rivals:
        rival = loaded.verdicts.get(subject._replace(backend=name))
        if rival is not None and not rival.failure and not rival.slower and rival.cost < verdict.cost:
            return (f"slower than {name} here",)
    return ()


@cache
def _advise() -> None:
    """Once in a process."""
    logger.info("There are faster kernels for this GPU, not tried on it yet: `basicsr warmup` tries them.")
