"""What BasicSR's ARCH_REGISTRY sees. Composition only: a constructor's arguments are an option file's network_g."""

from .esc_arch import ESC
from .layers_arch import ConvAttn, FlashWindowAttention

__all__ = ["ESC", "ConvAttn", "FlashWindowAttention"]
