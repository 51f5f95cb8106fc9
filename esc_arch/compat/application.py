"""Putting the patches of `patches.PATCHES` in the place of basicsr's functions."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

from . import patches
from .patches import SUPPORTED_VERSION

__all__ = ["apply_patches", "reason_against_patches"]

logger = logging.getLogger("esc_arch")


def apply_patches() -> None:
    """Put every replacement in place, once; does nothing for a basicsr that they are not made for, and says so."""
    if reason := reason_against_patches():
        folder = Path(str(sys.modules["basicsr"].__file__)).parent
        logger.warning(
            "esc_arch fixes faults of basicsr %s; %s is left as it is: %s.", SUPPORTED_VERSION, folder, reason
        )
        return
    for module, name, make, fixes in patches.PATCHES:
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

    # Distributions of other names have the version, and may have other contents
    for module, name, *_ in patches.PATCHES:
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
