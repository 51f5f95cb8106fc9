"""3 x 3 convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from esc_arch.ops.conv3x3 import conv3x3

__all__ = ["Conv3x3"]


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with padding 1 and stride 1, by a faster algorithm when the fused kernel is available.

    Shapes: (B, C, H, W) -> (B, D, H, W).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias)
