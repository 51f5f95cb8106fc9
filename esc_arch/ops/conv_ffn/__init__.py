"""The convolutional feed-forward network without parameters."""

from .api import conv_ffn, conv_ffn_fused

__all__ = ["conv_ffn", "conv_ffn_fused"]
