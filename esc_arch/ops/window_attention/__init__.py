"""Self-attention inside non-overlapping windows, with a position bias (arXiv 2503.06671)."""

from .api import WINDOW_ATTENTION, window_attention, window_attention_fused
from .bias import Bias, dense_bias
from .windows import merge_windows, pad_to_windows, split_windows

__all__ = [
    "WINDOW_ATTENTION",
    "Bias",
    "dense_bias",
    "merge_windows",
    "pad_to_windows",
    "split_windows",
    "window_attention",
    "window_attention_fused",
]
