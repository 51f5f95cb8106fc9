"""A 3 x 3 convolution with the normalisation before it and the addition behind it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["conv3x3"]


def conv3x3(conv: nn.Module, x: Tensor, *, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """residual + conv(norm(x)).

    Args:
        conv: 3 x 3, padding 1, stride 1.
        x: (B, C, H, W).
        norm: a LayerNorm before it; none for x as it is.
        residual: (B, D, H, W), added to the result.

    Returns:
        (B, D, H, W).
    """
    out = conv(x if norm is None else norm(x))
    return out if residual is None else out + residual
