"""Layers with parameters, shared by all networks; a file per concept. Nothing here knows of BasicSR."""

from .block import ESCBlock
from .conv_attn import ConvAttn, DecomposedConvAttn
from .conv_ffn import ConvFFN
from .lte import LTE
from .norm import LayerNorm
from .upsample import DySample, UniversalUpsampler
from .window_attention import FactorBiasWindowAttention, FlashWindowAttention, RIBWindowAttention

__all__ = [
    "LTE",
    "ConvAttn",
    "ConvFFN",
    "DecomposedConvAttn",
    "DySample",
    "ESCBlock",
    "FactorBiasWindowAttention",
    "FlashWindowAttention",
    "LayerNorm",
    "RIBWindowAttention",
    "UniversalUpsampler",
]
