"""Using parts of esc_arch without its own start, which imports BasicSR and all that BasicSR needs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

__all__ = ["replace_failed_packages"]

_ROOT = Path(__file__).parents[2]
#: Packages whose `__init__` needs BasicSR, though some of their modules do not.
_PACKAGES = (
    "esc_arch",
    "esc_arch.checkpoints",
    "esc_arch.compat",
    "esc_arch.data",
    "esc_arch.tools.upscale",
    "esc_arch.options",
)


def replace_failed_packages() -> None:
    """Put an empty package in the place of each that is not imported yet, or failed to be."""
    for name in _PACKAGES:
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(_ROOT.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
