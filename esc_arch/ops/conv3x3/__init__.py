"""3 x 3 convolutions of maps, also with the layer normalisation before and the addition after, without parameters."""

from .api import conv3x3, conv3x3_fused

__all__ = ["conv3x3", "conv3x3_fused"]
