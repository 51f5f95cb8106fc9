"""What BasicSR's ARCH_REGISTRY sees. Composition only: a constructor's arguments are an option file's network_g."""

from .esc_arch import ESC
from .esc_fp_arch import ESCFP
from .esc_lte_arch import ESCLTE
from .esc_real_arch import ESCReal, ESCRealM
from .esc_rib_arch import ESCRIB
from .layers_arch import ConvAttn, DecomposedConvAttn, FlashWindowAttention

__all__ = [
    "ESC",
    "ESCFP",
    "ESCLTE",
    "ESCRIB",
    "ConvAttn",
    "DecomposedConvAttn",
    "ESCReal",
    "ESCRealM",
    "FlashWindowAttention",
]
