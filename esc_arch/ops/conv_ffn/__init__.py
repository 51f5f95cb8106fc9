"""The convolutional feed-forward network without parameters."""

from .api import BACKENDS, conv_ffn, conv_ffn_step

__all__ = ["BACKENDS", "conv_ffn", "conv_ffn_step"]
