"""Data for BasicSR's pipelines: data sets, preparing LMDBs and benchmark folders, and the demo photographs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

with suppress(ModuleNotFoundError):  # some modules need none
    import basicsr  # noqa: F401  first: what comes with it imports modules of this package

if TYPE_CHECKING:
    from .arbitrary_scale_dataset import ArbitraryScaleDataset
    from .downsample_dataset import DownsampleImageDataset

__all__ = ["ArbitraryScaleDataset", "DownsampleImageDataset"]


def __getattr__(name: str) -> Any:
    # The data sets need BasicSR, the other modules do not
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import arbitrary_scale_dataset, downsample_dataset

    return getattr(arbitrary_scale_dataset, name, None) or getattr(downsample_dataset, name)
