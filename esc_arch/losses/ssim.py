"""Structural similarity as a loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import ImageLoss

__all__ = ["SSIMLoss"]

_SIDE = 11
_SIGMA = 1.5
# (K1 L)^2 and (K2 L)^2 for the data range L = 1
_C1 = 0.01**2
_C2 = 0.03**2


class SSIMLoss(ImageLoss):
    """1 - SSIM (Wang et al., 2004, doi:10.1109/TIP.2003.819861), the mean over images, channels and pixels.

    Gaussian window of 11 x 11 pixels and sigma 1.5, for values in 0 .. 1; only windows within the image count.
    Each channel is compared by itself: of RGB images this is not the SSIM of the Y channel that papers report.

    Args:
        loss_weight: see `ImageLoss`.
    """

    smallest_side = _SIDE
    gaussian: Tensor

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__(loss_weight)
        gaussian = torch.exp(-((torch.arange(_SIDE) - _SIDE // 2) ** 2) / (2 * _SIGMA**2))
        self.register_buffer("gaussian", gaussian / gaussian.sum(), persistent=False)

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        moments = torch.cat([pred, target, pred**2, target**2, pred * target], dim=1)
        mean_p, mean_t, square_p, square_t, product = self._blur(moments).chunk(5, dim=1)
        variances = square_p - mean_p**2 + square_t - mean_t**2
        covariance = product - mean_p * mean_t
        similarity = (2 * mean_p * mean_t + _C1) * (2 * covariance + _C2)
        return 1 - (similarity / ((mean_p**2 + mean_t**2 + _C1) * (variances + _C2))).mean()

    def _blur(self, x: Tensor) -> Tensor:
        """Weighted means over the window: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
        channels = x.shape[1]
        kernel = self.gaussian.expand(channels, 1, 1, _SIDE).contiguous()
        # PyTorch has a kernel of its own for depth-wise convolutions of this layout. cuDNN, which takes the others,
        # would round to TF32 where that is allowed, and leave nothing of the differences of squares.
        x = F.conv2d(x.contiguous(), kernel, groups=channels)
        return F.conv2d(x, kernel.transpose(-2, -1).contiguous(), groups=channels)
