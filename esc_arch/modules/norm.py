"""Layer normalisation of feature maps."""

from __future__ import annotations

from torch import Tensor, nn

from esc_arch.ops.layer_norm import layer_norm

from .precision import in_float32

__all__ = ["LayerNorm"]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map, at every pixel by itself; eps 1e-6.

    Shapes: (B, C, H, W) -> (B, C, H, W). Parameters `weight` and `bias`, (C,).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)
