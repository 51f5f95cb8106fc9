"""Convolutional attention without parameters: the large kernel's symmetry, and the two convolutions."""

from .reference import conv_attention, decomposed_conv_attention
from .symmetry import symmetrise

__all__ = ["conv_attention", "decomposed_conv_attention", "symmetrise"]
