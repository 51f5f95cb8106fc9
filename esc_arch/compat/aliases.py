"""Stand-ins for modules that basicsr 1.4.2 imports and that current libraries no longer have.

Each is added to ``sys.modules`` only when the real one is missing. Worker processes that Python starts by
spawning import the main module again, and with it esc_arch, so they have the stand-ins as well.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
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
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _install(name: str, module: ModuleType) -> None:
    """Put `module` at `name`, and make it an attribute of its parent package (`from parent import child`)."""
    parent_name, _, child = name.rpartition(".")
    if not _importable(parent_name):
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
    from packaging.version import Version  # scikit-image, which basicsr requires, brings it

    module = ModuleType("distutils.version")
    module.LooseVersion = Version  # type: ignore[attr-defined]
    return module


def _ndimage_filters() -> ModuleType:
    """SciPy 2 has these functions only in scipy.ndimage itself."""
    return importlib.import_module("scipy.ndimage")


_STAND_INS: dict[str, Callable[[], ModuleType]] = {
    "torchvision.transforms.functional_tensor": _functional_tensor,
    "distutils.version": _distutils_version,
    "scipy.ndimage.filters": _ndimage_filters,
}
