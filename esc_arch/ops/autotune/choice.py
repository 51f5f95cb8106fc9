"""Apply cached autotune results of this machine's GPU to `auto`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

from esc_arch.ops import operation

from .results import Case, load

__all__ = ["auto_skip_reasons", "forget"]

logger = logging.getLogger(__name__)


def forget() -> None:
    """Read the files again: they have changed."""
    load.cache_clear()
    operation.forget()


def auto_skip_reasons(case: Case, device: str, index: int | None, rivals: Sequence[str] = ()) -> list[str]:
    """Why `auto` does not take a backend that can run; empty where it was found exact and faster.

    Args:
        case: what is to be computed, and by which backend.
        device, index: type and number of the device that the inputs are on.
        rivals: other autotuned backends that can take the same inputs and come later in `auto`'s order.
    """
    if device == "cpu":
        return ["on a CPU its kernels are interpreted, for tests alone"]
    switch = os.environ.get("ESC_ARCH_TRITON")
    if switch == "1":
        return []
    if switch == "0":
        return ["ESC_ARCH_TRITON=0 keeps auto from it"]
    results, problem = load(device, index)
    result = results.get(case)
    if problem:
        return [f"what its trial found is not known, {problem}: `basicsr warmup` tries it again"]
    if result is None:
        if not results:
            _advise()
        return ["not tried on this GPU yet: `basicsr warmup` tries it"]
    if result.failure:
        return [f"failed its trial on this GPU: {result.failure}; `basicsr warmup --again` tries it again"]
    if result.slower:
        return [result.slower]
    for name in rivals:
        rival = results.get(case._replace(backend=name))
        if rival is not None and not rival.failure and not rival.slower and rival.cost < result.cost:
            return [f"slower than {name} here"]
    return []


@cache
def _advise() -> None:
    """Once in a process."""
    logger.info("There are faster kernels for this GPU, not tried on it yet: `basicsr warmup` tries them.")
