"""Layer normalisation of feature maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
