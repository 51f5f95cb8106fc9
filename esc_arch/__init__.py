"""ESC image super-resolution (ICCV 2025, arXiv 2503.06671) as a plugin of BasicSR.

Importing this package is all that an existing BasicSR set-up needs: it makes basicsr 1.4.2 importable with
current libraries and registers the networks, layers, data sets and models below, so that option files can name them.
That is its only side effect. Without BasicSR there are the networks, layers and tools; training says what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .errors import NO_BASICSR, UserError
from .version import __version__

if importlib.util.find_spec("basicsr") is not None:
    try:
        # The order of these imports is the point: basicsr can only be imported in between
        from . import compat, project

        compat.prepare_import()

        import basicsr  # noqa: F401

        compat.apply_patches()
        project.find_as_parent_process()

        from .register import register_all

        register_all()
    except Exception as error:
        # What keeps BasicSR from being imported is what `basicsr doctor` is asked for: it ends the process, if it is it
        from .tools.doctor.command import run_where_the_import_failed

        run_where_the_import_failed(error)
        raise

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

#: Where the names above are defined, in the order to look.
_PLACES = ("archs", "losses", "data", "models")


def __getattr__(name: str) -> Any:
    """Import what is asked for: training needs no libraries that read pictures, and networks need no BasicSR."""
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
