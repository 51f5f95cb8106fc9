"""Losses of whole images beyond BasicSR's: frequencies, structural similarity, learned features."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch.compat.archs import tensors_only
from esc_arch.errors import UserError

__all__ = ["FFTLoss", "ImageLoss", "LPIPSLoss", "SSIMLoss"]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM
_C1, _C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 for the data range L = 1

#: net -> the file of torchvision's weights, and the smallest images that reach its last features
_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "vgg": ("vgg16-397923af.pth", 16),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
}
_MISSING = 'LPIPSLoss needs the package lpips: pip install "esc-arch[lpips]", or leave this loss out'


class ImageLoss(nn.Module, ABC):
    """A loss of whole images, always computed in float32: differences of squares do not survive less.

    Shapes: (B, C, H, W) twice, of values in 0 .. 1, to a scalar, times `loss_weight`. UserError when called with
    images that have a side below `smallest_side`.
    """

    #: Over the images of a batch; `accumulate_grad` needs to know.
    reduction: str = "mean"
    #: Pixels.
    smallest_side: int = 1

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    @classmethod
    def option_problems(cls, **options: Any) -> Iterator[str]:
        """Invalid values of the options, found before a run."""
        try:
            cls(**options)
        except (TypeError, ValueError) as error:
            yield str(error)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        side = min(pred.shape[-2:])
        if side < self.smallest_side:
            raise UserError(
                f"{type(self).__name__} needs images of at least {self.smallest_side} pixels on each side; these are "
                f"{pred.shape[-1]} x {pred.shape[-2]}. Raise datasets: train: gt_size."
            )
        with torch.autocast(pred.device.type, enabled=False):
            return self.loss_weight * self.compute(pred.float(), target.float())

    @abstractmethod
    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """The unweighted loss of float32 images."""


class FFTLoss(ImageLoss):
    """L1 distance of the images' 2-D real Fourier transforms, of real and imaginary parts alike.

    The transform has H * (W // 2 + 1) frequencies; the rest are their conjugates.

    Args:
        reduction: mean or sum, over images, channels, frequencies and the two parts; otherwise a ValueError.
        norm: the transform's scaling, as of `torch.fft.rfft2`: backward (none), ortho (1 / sqrt(H W)) or
            forward (1 / (H W)); otherwise a ValueError.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", norm: str = "backward") -> None:
        super().__init__(loss_weight)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; FFTLoss takes mean or sum.")
        if norm not in ("backward", "ortho", "forward"):
            raise ValueError(f"norm is {norm!r}; FFTLoss takes backward, ortho, forward.")
        self.reduction = reduction
        self.norm = norm

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        # The transform is linear, and the difference of the images the smaller number
        distance = torch.view_as_real(torch.fft.rfft2(pred - target, norm=self.norm)).abs()
        return distance.mean() if self.reduction == "mean" else distance.sum()


class SSIMLoss(ImageLoss):
    """1 - SSIM (Wang et al., 2004, doi:10.1109/TIP.2003.819861), the mean over images, channels and pixels.

    Gaussian window of 11 x 11 pixels and sigma 1.5, for values in 0 .. 1; only windows within the image count.
    Channels are compared one by one: of RGB images this is not the SSIM of the Y channel that papers report.
    """

    smallest_side = _WINDOW
    gaussian: Tensor

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__(loss_weight)
        gaussian = torch.exp(-((torch.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
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
        kernel = self.gaussian.expand(channels, 1, 1, _WINDOW).contiguous()
        # PyTorch has a kernel of its own for depth-wise convolutions of this layout. cuDNN, which takes the others,
        # would round to TF32 where that is allowed, and leave nothing of the differences of squares.
        x = F.conv2d(x.contiguous(), kernel, groups=channels)
        return F.conv2d(x, kernel.transpose(-2, -1).contiguous(), groups=channels)


class LPIPSLoss(ImageLoss):
    """Learned perceptual distance (Zhang et al., 2018, arXiv 1801.03924), the mean over images.

    Needs the package lpips (``pip install "esc-arch[lpips]"``), and its backbone's weights, which torchvision
    downloads once.

    `net` is the backbone: alex, vgg or squeeze; its authors recommend alex to measure and vgg to train.

    Raises:
        ValueError: an invalid net.
        UserError: lpips is not installed, or the backbone's weights cannot be downloaded.
    """

    def __init__(self, loss_weight: float = 1.0, net: str = "vgg") -> None:
        super().__init__(loss_weight)
        if net not in _BACKBONES:
            raise ValueError(next(self.option_problems(net=net)))
        file, self.smallest_side = _BACKBONES[net]
        folder = Path(torch.hub.get_dir(), "checkpoints")
        try:
            import lpips
        except ImportError as error:
            raise UserError(f"{_MISSING} ({error})") from error
        try:
            with tensors_only(f"LPIPSLoss's backbone ({folder / file})"):
                self.net = lpips.LPIPS(net=net, verbose=False)
        except OSError as error:  # URLError and time-outs are OSErrors
            raise UserError(
                f"The weights of LPIPSLoss's backbone could not be downloaded ({error}). Get the file {file} from "
                f"https://download.pytorch.org/models/{file} on another machine and put it in {folder}."
            ) from error
        self.net.requires_grad_(False)  # lpips leaves its own layers trainable

    @classmethod
    def option_problems(cls, *, net: str = "vgg", **_: object) -> Iterator[str]:
        # Building one would download the backbone
        if net not in _BACKBONES:
            yield f"net is {net!r}; LPIPSLoss takes {', '.join(_BACKBONES)}."
        if importlib.util.find_spec("lpips") is None:
            yield _MISSING

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.net(2 * pred - 1, 2 * target - 1).mean()  # it takes values in -1 .. 1
