"""A loss in the frequency domain."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ImageLoss

__all__ = ["FFTLoss"]

_REDUCTIONS = ("mean", "sum")
_NORMS = ("backward", "ortho", "forward")


class FFTLoss(ImageLoss):
    """L1 distance of the images' 2-D real Fourier transforms, of real and imaginary parts alike.

    The transform has H * (W // 2 + 1) frequencies; those left out are conjugates of others.

    Args:
        loss_weight: see `ImageLoss`.
        reduction: mean or sum, over images, channels, frequencies and the two parts.
        norm: the transform's scaling, as of `torch.fft.rfft2`: backward (none), ortho (1 / sqrt(H W)) or
            forward (1 / (H W)).

    Raises:
        ValueError: another reduction or norm.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", norm: str = "backward") -> None:
        super().__init__(loss_weight)
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; FFTLoss takes {' or '.join(_REDUCTIONS)}.")
        if norm not in _NORMS:
            raise ValueError(f"norm is {norm!r}; FFTLoss takes {', '.join(_NORMS)}.")
        self.reduction = reduction
        self.norm = norm

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        # The transform is linear, and the difference of the images the smaller number
        distance = torch.view_as_real(torch.fft.rfft2(pred - target, norm=self.norm)).abs()
        return distance.mean() if self.reduction == "mean" else distance.sum()
