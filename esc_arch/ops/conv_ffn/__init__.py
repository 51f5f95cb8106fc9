"""The convolutional feed-forward network without parameters."""

from .api import BACKENDS, conv_ffn

__all__ = ["BACKENDS", "conv_ffn"]
