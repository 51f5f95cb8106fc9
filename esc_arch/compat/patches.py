"""The list of patches: functions of basicsr 1.4.2 that fail, each with its replacement.

The patches are in modules named after the parts of basicsr that they are for, which are imported when the patches are
applied, so after basicsr. A replacement that only adds a check or a message calls the original. What a run that works
computes stays the same, but for two faults: a run ended before `total_iter`, and its workers drew the same random crops
in every epoch. All patches are for this version, and none is applied to another, or to one that lacks a function of
them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PATCHES", "SUPPORTED_VERSION", "Original", "apply_patches", "patch", "reason_against_patches", "replace"]

SUPPORTED_VERSION = "1.4.2"

logger = logging.getLogger("esc_arch")

#: The function of basicsr that is replaced; the first parameter of every patch.
Original = Callable[..., Any]


#: (module, dotted name in it, what makes the replacement of the original, what it fixes)
PATCHES: list[tuple[str, str, Callable[[Any], Any], str]] = []


def patch(module: str, name: str, fixes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a patch: it gets the original, and then the arguments of the call."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        PATCHES.append((module, name, functools.partial(_with_original, function), fixes))
        return function

    return register


def replace(module: str, name: str, fixes: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the replacement of a class or module: the decorated function gets the original and returns another."""

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PATCHES.append((module, name, make, fixes))
        return make

    return register


def _with_original(function: Callable[..., Any], original: Original) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return replacement


def apply_patches() -> None:
    """Put every replacement in place, once; does nothing for a basicsr that they are not made for, and says so."""
    if reason := reason_against_patches():
        folder = Path(str(sys.modules["basicsr"].__file__)).parent
        logger.warning(
            "esc_arch fixes faults of basicsr %s; %s is left as it is: %s.", SUPPORTED_VERSION, folder, reason
        )
        return
    for module, name, make, fixes in PATCHES:
        owner, attribute, current = _find(module, name)
        original = getattr(current, "_esc_arch_original", current)  # after a re-import: never patch a patch
        replacement = make(original)
        replacement._esc_arch_original = original
        setattr(owner, attribute, replacement)
        if attribute == name and not inspect.ismodule(current):
            _replace_imported_names(name, current, replacement)
        logger.debug("basicsr: %s.%s replaced: %s", module, name, fixes)


def reason_against_patches() -> str:
    """Why nothing is replaced in the basicsr that is imported; empty if it is patched."""
    version = getattr(sys.modules["basicsr"], "__version__", "unknown")
    if version != SUPPORTED_VERSION:
        return f"this is {version}"
    from . import archs, data, files, logs, models, prefetch, training  # noqa: F401  they register their patches

    for module, name, *_ in PATCHES:  # distributions of other names have the version, and may have other contents
        try:
            _find(module, name)
        except (ImportError, AttributeError):
            return f"it has no {module}.{name}"
    return ""


def _find(module: str, name: str) -> tuple[Any, str, Any]:
    """The module or class that has a function, the function's name in it, and the function."""
    *parents, attribute = name.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    return owner, attribute, getattr(owner, attribute)


def _replace_imported_names(name: str, current: object, replacement: object) -> None:
    """`from basicsr.utils import f` made more names for the same function."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in ("basicsr", "esc_arch") and getattr(module, name, None) is current:
            setattr(module, name, replacement)
