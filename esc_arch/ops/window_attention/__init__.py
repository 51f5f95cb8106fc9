"""Self-attention inside non-overlapping windows, with a relative position bias (paper, section 3.2)."""

from .api import BACKENDS, resolve_backend, window_attention
from .bias import dense_bias
from .windows import merge_windows, reflect_pad, split_windows

__all__ = [
    "BACKENDS",
    "dense_bias",
    "merge_windows",
    "reflect_pad",
    "resolve_backend",
    "split_windows",
    "window_attention",
]
