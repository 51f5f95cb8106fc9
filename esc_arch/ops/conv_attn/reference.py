"""ConvAttn's two convolutions, as the formula has them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["forward", "per_image_depthwise"]


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> Tensor:
    """Two convolutions, added; see `conv_attention`."""
    static = F.conv2d(x, large_kernel, padding=large_kernel.shape[-1] // 2)
    return static + per_image_depthwise(x, dynamic_kernel)


def per_image_depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """Depth-wise convolution with zero padding, where each image has kernels of its own.

    Args:
        x: (B, C, H, W).
        kernel: (B, C, k, k) with k odd.

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    side = kernel.shape[-1]
    # A grouped convolution has one kernel per channel: the images of the batch become channels of a single one
    out = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        kernel.reshape(batch * channels, 1, side, side),
        padding=side // 2,
        groups=batch * channels,
    )
    return out.reshape(batch, channels, height, width)
