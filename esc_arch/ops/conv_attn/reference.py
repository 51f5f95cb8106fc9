"""ConvAttn's two convolutions, as the formula has them, and the symmetry of the large kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["forward", "per_image_depthwise", "symmetrise"]


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


def symmetrise(kernel: Tensor) -> Tensor:
    """The average of a filter over the 8 symmetries of the square (arXiv 2503.06671).

    They are the four flips (none, horizontal, vertical, both) and the same four after a rotation by 90 degrees,
    which are the transposes of the flips. Applying this twice changes nothing, not even a bit: the sums below are
    exactly symmetric, and a sum of eight equal numbers divided by eight is exact.

    Args:
        kernel: (..., K, K).

    Returns:
        (..., K, K), of whose K * K taps at most (n + 1)(n + 2) / 2 differ, n = K // 2 (28 of 169 for K = 13).
    """
    flipped = kernel + kernel.flip(-1)
    flipped = flipped + flipped.flip(-2)
    return (flipped + flipped.transpose(-2, -1)) / 8
