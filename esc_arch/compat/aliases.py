"""Stand-ins for modules that basicsr 1.4.2 imports and that current libraries no longer have.

Each is added to ``sys.modules`` only when the real one is missing. Worker processes that Python starts by
spawning import the main module again, and with it esc_arch, so they have the stand-ins as well.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

__all__ = ["add_missing_modules", "stand_ins_in_use"]

logger = logging.getLogger("esc_arch")

#: By module: the name that basicsr imports from it, and the module and name that stand in for it.
_STAND_INS = {
    # torchvision made this module private in 0.15 and removed it in 0.17
    "torchvision.transforms.functional_tensor": (
        "rgb_to_grayscale", "torchvision.transforms.functional", "rgb_to_grayscale"
    ),
    # Python 3.12 has no distutils, and setuptools, which brings one, need not be installed. (scikit-image, which
    # basicsr requires, brings packaging)
    "distutils.version": ("LooseVersion", "packaging.version", "Version"),
    # SciPy 2 has the function only in scipy.ndimage itself
    "scipy.ndimage.filters": ("convolve", "scipy.ndimage", "convolve"),
}  # fmt: skip


def add_missing_modules() -> None:
    """Add every stand-in whose original cannot be imported."""
    for name, (attribute, source, source_attribute) in _STAND_INS.items():
        if not _importable(name):
            stand_in = sys.modules[name] = ModuleType(name)
            setattr(stand_in, attribute, getattr(importlib.import_module(source), source_attribute))
            parent, _, child = name.rpartition(".")
            if not _importable(parent):
                sys.modules[parent] = ModuleType(parent)
            setattr(sys.modules[parent], child, stand_in)  # for `from parent import child`
            logger.debug("basicsr needs the module %s, which is gone: using a stand-in.", name)


def stand_ins_in_use() -> list[str]:
    """The modules whose originals are missing."""
    return [name for name in _STAND_INS if name in sys.modules and sys.modules[name].__spec__ is None]


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
