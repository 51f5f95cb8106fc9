"""Convolutional attention without parameters: the large kernel's symmetry, and the two convolutions."""

from .api import conv_attention, conv_attention_fused, decomposed_conv_attention
from .reference import symmetrise

__all__ = ["conv_attention", "conv_attention_fused", "decomposed_conv_attention", "symmetrise"]
