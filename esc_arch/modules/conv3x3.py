"""3 x 3 convolutions, with the normalisation before and the addition behind them."""

from __future__ import annotations

from torch import Tensor, nn

from esc_arch.ops import conv3x3 as operators

from .fused import can_fuse, norm_params

__all__ = ["Conv3x3", "conv3x3"]


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with padding 1 and stride 1, by a faster algorithm when the fused kernel is available.

    Shapes: (B, C, H, W) -> (B, D, H, W).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return operators.conv3x3(x, self.weight, self.bias)


def conv3x3(conv: nn.Module, x: Tensor, *, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """residual + conv(norm(x)), in one pass over the map when the fused kernel is available.

    Args:
        conv: `Conv3x3`, or what was put in its place.
        x: (B, C, H, W).
        norm: a LayerNorm before it; none for x as it is.
        residual: (B, D, H, W), added to the result.

    Returns:
        (B, D, H, W).
    """
    if isinstance(conv, Conv3x3) and can_fuse(conv, norm):
        done = operators.conv3x3_step(x, *norm_params(norm), conv.weight, conv.bias, residual)
        if done is not None:
            return done
    out: Tensor = conv(x if norm is None else norm(x))
    return out if residual is None else out + residual
