"""ESC's two attention layers, to be built by themselves from option files."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY

from esc_arch.modules import ConvAttn, DecomposedConvAttn, FlashWindowAttention
from esc_arch.registry import register

__all__ = ["ConvAttn", "DecomposedConvAttn", "FlashWindowAttention"]

for layer in (ConvAttn, DecomposedConvAttn, FlashWindowAttention):
    register(ARCH_REGISTRY)(layer)
