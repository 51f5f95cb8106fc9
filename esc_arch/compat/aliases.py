"""Stand-ins for modules that basicsr 1.4.2 imports and that current libraries no longer have.

Each is added to ``sys.modules`` only when the real one is missing. Worker processes that Python starts by
spawning import the main module again, and with it esc_arch, so they have the stand-ins as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from functools import total_ordering
from types import ModuleType

__all__ = ["add_missing_modules", "stand_ins_in_use"]

logger = logging.getLogger("esc_arch")


def add_missing_modules() -> None:
    """Add every stand-in whose original cannot be imported."""
    for name, make in _STAND_INS.items():
        if not _importable(name):
            _install(name, make())
            logger.debug("basicsr needs the module %s, which is gone: using a stand-in.", name)


def stand_ins_in_use() -> list[str]:
    """The modules whose originals are missing."""
    modules = {name: sys.modules.get(name) for name in _STAND_INS}
    # (A stand-in was not found on the path, or is another module under this name)
    return [name for name, module in modules.items() if module and (module.__spec__ is None or module.__name__ != name)]


def _importable(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        if name.startswith("distutils") and sys.version_info < (3, 12):
            # Part of the standard library; importing it only to look would print a deprecation warning
            return importlib.util.find_spec("distutils") is not None
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _install(name: str, module: ModuleType) -> None:
    """Put `module` at `name`, and make it an attribute of its parent package (`from parent import child`)."""
    parent_name, _, child = name.rpartition(".")
    if parent_name not in sys.modules and not _importable(parent_name):
        sys.modules[parent_name] = ModuleType(parent_name)
    setattr(sys.modules[parent_name], child, module)
    sys.modules[name] = module


def _functional_tensor() -> ModuleType:
    """torchvision made this module private in 0.15 and removed it in 0.17; basicsr wants one function of it."""
    from torchvision.transforms.functional import rgb_to_grayscale

    module = ModuleType("torchvision.transforms.functional_tensor")
    module.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    return module


def _distutils_version() -> ModuleType:
    """Python 3.12 has no distutils, and setuptools, which brings one, need not be installed."""
    module = ModuleType("distutils.version")
    module.LooseVersion = LooseVersion  # type: ignore[attr-defined]
    return module


def _ndimage_filters() -> ModuleType:
    """SciPy 2 has these functions only in scipy.ndimage itself."""
    return importlib.import_module("scipy.ndimage")


@total_ordering
class LooseVersion:
    """What basicsr uses of distutils' class of this name: comparing the numbers of two releases."""

    def __init__(self, text: str) -> None:
        self.text = text
        # "2.6.0+cu124" and "2.7.0a0" count as releases 2.6.0 and 2.7.0
        self.version = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LooseVersion) and self.version == other.version

    def __lt__(self, other: LooseVersion) -> bool:
        return self.version < other.version

    def __hash__(self) -> int:
        return hash(tuple(self.version))


_STAND_INS: dict[str, Callable[[], ModuleType]] = {
    "torchvision.transforms.functional_tensor": _functional_tensor,
    "distutils.version": _distutils_version,
    "scipy.ndimage.filters": _ndimage_filters,
}
