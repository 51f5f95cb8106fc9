"""The list of patches: functions of basicsr 1.4.2 that fail, each with its replacement.

The patches are in modules named after the parts of basicsr that they are for, which are imported after it, when they
are applied. What a run that works computes stays the same, but for two faults: it ended before `total_iter`, and its
workers drew the same random crops in every epoch. None is applied to another version, or to one that lacks a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["PATCHES", "SUPPORTED_VERSION", "Original", "patch"]

SUPPORTED_VERSION = "1.4.2"

#: The function of basicsr that is replaced; the first parameter of every patch.
Original = Callable[..., Any]

#: (module, dotted name in it, what makes the replacement of the original, what it fixes)
PATCHES: list[tuple[str, str, Callable[[Any], Any], str]] = []


def patch(module: str, name: str, fixes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a patch: it gets the original, and then the arguments of the call."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(original: Original) -> Original:
            @functools.wraps(original)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                return function(original, *args, **kwargs)

            return replacement

        PATCHES.append((module, name, make, fixes))
        return function

    return register
