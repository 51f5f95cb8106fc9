"""Data for BasicSR's pipelines: data sets, preparing LMDBs and benchmark folders, and the demo photographs."""

from .arbitrary_scale_dataset import ArbitraryScaleDataset
from .downsample_dataset import DownsampleImageDataset

__all__ = ["ArbitraryScaleDataset", "DownsampleImageDataset"]
