"""Layers with parameters, shared by all networks; a file per concept. Nothing here knows of BasicSR."""

from .block import ESCBlock
from .conv_attn import ConvAttn
from .conv_ffn import ConvFFN
from .norm import LayerNorm
from .upsample import pixel_shuffle_with_skip, rescale_subpixel_conv
from .window_attention import FlashWindowAttention

__all__ = [
    "ConvAttn",
    "ConvFFN",
    "ESCBlock",
    "FlashWindowAttention",
    "LayerNorm",
    "pixel_shuffle_with_skip",
    "rescale_subpixel_conv",
]
