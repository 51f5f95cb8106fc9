"""The way from features to the enlarged picture."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

__all__ = ["pixel_shuffle_with_skip", "rescale_subpixel_conv"]


def pixel_shuffle_with_skip(subpixels: Tensor, image: Tensor, scale: int) -> Tensor:
    """Pixel shuffle of the network's residual, added to the image enlarged by repeating its pixels.

    Args:
        subpixels: (B, 3 * scale^2, H, W).
        image: (B, 3, H, W), the network's input.

    Returns:
        (B, 3, H * scale, W * scale).
    """
    return F.pixel_shuffle(subpixels + image.repeat_interleave(scale**2, dim=1), scale)


def rescale_subpixel_conv(tensor: Tensor, channels: int) -> Tensor:
    """The weight or bias of a convolution before a pixel shuffle, made for another scale.

    Its output channels are `colours` grids of (s, s) sub-pixels; the grid is interpolated bilinearly
    (align_corners false) to (t, t). This is how networks for x3 and x4 start from x2.

    Args:
        tensor: (3 * s^2, ...), weight or bias.
        channels: 3 * t^2, the output channels wanted.

    Returns:
        (3 * t^2, ...).

    Raises:
        ValueError: a number of channels is not 3 times a square.
    """
    colours = 3
    source, target = (math.isqrt(n // colours) for n in (tensor.shape[0], channels))
    for n, side in ((tensor.shape[0], source), (channels, target)):
        if colours * side**2 != n:
            raise ValueError(f"{n} channels are not {colours} colours times a square of sub-pixels.")
    grid = tensor.reshape(colours, source, source, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(channels, *tensor.shape[1:])
