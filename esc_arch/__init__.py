"""ESC image super-resolution (ICCV 2025, arXiv 2503.06671) as a plugin of BasicSR.

Importing this package is all that an existing BasicSR set-up needs: from then on, basicsr 1.4.2 can be imported with
current libraries, and has the networks, layers, data sets and models below registered, so that option files can name
them. That is its only side effect. Without BasicSR there are the networks, layers and tools; training says what is
missing.
"""

from __future__ import annotations

import os
import sys

# With -m Python looks first in the current folder, where anything may lie; a clone of this package may do so, too
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == __name__
    and not getattr(sys.flags, "safe_path", False)
    and sys.path[0] != os.path.dirname(os.path.dirname(__file__))
):
    del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

from .errors import NO_BASICSR, UserError
from .on_import import attach_to_basicsr
from .project import find_as_parent_process
from .version import __version__

attach_to_basicsr()
find_as_parent_process()

if TYPE_CHECKING:
    from .archs import ESC, ESCFP, ESCLTE, ESCRIB, ConvAttn, DecomposedConvAttn, ESCReal, ESCRealM, FlashWindowAttention
    from .data import ArbitraryScaleDataset, DownsampleImageDataset
    from .losses import FFTLoss, LPIPSLoss, SSIMLoss
    from .models import ESCLTEModel, ESCModel, ESCRealGANModel, ESCRealMSEModel
    from .tools.upscale.network import load
    from .tools.upscale.upscaling import upscale

__all__ = [
    "ESC",
    "ESCFP",
    "ESCLTE",
    "ESCRIB",
    "ArbitraryScaleDataset",
    "ConvAttn",
    "DecomposedConvAttn",
    "DownsampleImageDataset",
    "ESCLTEModel",
    "ESCModel",
    "ESCReal",
    "ESCRealGANModel",
    "ESCRealM",
    "ESCRealMSEModel",
    "FFTLoss",
    "FlashWindowAttention",
    "LPIPSLoss",
    "SSIMLoss",
    "UserError",
    "__version__",
    "load",
    "upscale",
]

#: Where the names above are defined, in the order to look; modules that can be used without an import of their own.
_PLACES = ("archs", "losses", "data", "models")
_MODULES = (
    *_PLACES,
    "checkpoints",
    "compat",
    "graphs",
    "integrations",
    "modules",
    "ops",
    "options",
    "tools",
    "training",
)


def __getattr__(name: str) -> Any:
    """Import what is asked for: training needs no libraries that read pictures, and networks need no BasicSR."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = ("tools.upscale",) if name in ("load", "upscale") else _PLACES
    for place in places:
        try:
            module = importlib.import_module(f"{__name__}.{place}")
        except ModuleNotFoundError as error:
            if error.name != "basicsr":
                raise
            raise ImportError(f"{name} is for training. {NO_BASICSR}") from None
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
