"""ESC image super-resolution (ICCV 2025, arXiv 2503.06671) as a plugin of BasicSR.

Importing this package is all that an existing BasicSR set-up needs: it makes basicsr 1.4.2 importable with
current libraries and registers the networks, layers, data sets and models below, so that option files can name them.
That is its only side effect.
"""

# ruff: noqa: E402  the order of these imports is the point: basicsr can only be imported in between

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import compat

compat.prepare_import()

import basicsr  # noqa: F401

compat.apply_patches()

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
from .version import __version__

if TYPE_CHECKING:
    from .inference.network import load
    from .inference.upscaling import upscale

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
    from . import inference

    return getattr(inference, name)
