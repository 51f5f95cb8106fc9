"""ESC image super-resolution (ICCV 2025, arXiv 2503.06671) as a plugin of BasicSR.

Importing this package is all that an existing BasicSR set-up needs: it makes basicsr 1.4.2 importable with
current libraries and registers the networks, layers, data sets and models below, so that option files can name them.
That is its only side effect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    # The order of these imports is the point: basicsr can only be imported in between
    from . import compat, project

    compat.prepare_import()

    import basicsr  # noqa: F401

    compat.apply_patches()
    project.find_as_parent_process()

    from .archs import (
        ESC,
        ESCFP,
        ESCLTE,
        ESCRIB,
        ConvAttn,
        DecomposedConvAttn,
        ESCReal,
        ESCRealM,
        FlashWindowAttention,
    )
    from .data import ArbitraryScaleDataset, DownsampleImageDataset
    from .errors import UserError
    from .losses import FFTLoss, LPIPSLoss, SSIMLoss
    from .models import ESCLTEModel, ESCModel, ESCRealGANModel, ESCRealMSEModel
    from .register import register_all

    register_all()
except Exception as error:
    # What keeps BasicSR from being imported is what `basicsr doctor` is asked for: it ends the process, if it is that
    from .tools.doctor.command import run_where_the_import_failed

    run_where_the_import_failed(error)
    raise

from .version import __version__

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # Training needs neither these nor the libraries that read pictures
    if name not in ("load", "upscale"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tools import upscale as tools

    return getattr(tools, name)
