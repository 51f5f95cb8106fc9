"""The networks, a file each, and layers that option files can build by themselves.

A constructor's arguments are the keys of an option file's network_g. All that is exported here is registered for them.
"""

from esc_arch.modules import ConvAttn, DecomposedConvAttn, FlashWindowAttention

from .esc_arch import ESC
from .esc_fp_arch import ESCFP
from .esc_lte_arch import ESCLTE
from .esc_real_arch import ESCReal, ESCRealM
from .esc_rib_arch import ESCRIB

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
