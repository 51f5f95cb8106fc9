"""ConvAttn's two convolutions, as the formula has them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_attention"]


def conv_attention(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor) -> Tensor:
    """One large static kernel for all images, plus a small depth-wise kernel of each image's own.

    Args:
        x: (B, C, H, W).
        large_kernel: (C, C, K, K) with K odd, zero padding.
        dynamic_kernel: (B, C, k, k) with k odd: channel c of image b is filtered by dynamic_kernel[b, c].

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    static = F.conv2d(x, large_kernel, padding=large_kernel.shape[-1] // 2)
    # A grouped convolution has one kernel per channel: the images of the batch become channels of a single one
    side = dynamic_kernel.shape[-1]
    dynamic = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        dynamic_kernel.reshape(batch * channels, 1, side, side),
        padding=side // 2,
        groups=batch * channels,
    )
    return static + dynamic.reshape(batch, channels, height, width)
