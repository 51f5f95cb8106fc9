"""The one place that knows what basicsr 1.4.2 needs to run, safely, on current libraries.

With esc_arch imported, ``import basicsr`` begins with :func:`prepare_import` and ends with :func:`apply_patches`.
Nothing in site-packages is edited, and nothing changes what a working BasicSR experiment computes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

from . import patches
from .aliases import add_missing_modules
from .duplicate_installs import warn_about_copies, warn_about_script
from .patches import PATCHES, SUPPORTED_VERSION

__all__ = ["PATCHES", "SUPPORTED_VERSION", "apply_patches", "prepare_import", "reason_against_patches"]

logger = logging.getLogger("esc_arch")


def prepare_import(*, imported_before: bool = False) -> None:
    """Make ``import basicsr`` possible with the installed libraries; warn if it is unclear which BasicSR runs."""
    warn_about_copies(imported_before)
    warn_about_script()
    add_missing_modules()


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
            # `from basicsr.utils import f` made more names for the same function
            for key, other in list(sys.modules.items()):
                if key.partition(".")[0] in ("basicsr", "esc_arch") and getattr(other, name, None) is current:
                    setattr(other, name, replacement)
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
