"""A loss of learned features, from its authors' package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from esc_arch.compat.archs import tensors_only
from esc_arch.errors import UserError

from .image_losses import ImageLoss

__all__ = ["LPIPSLoss"]

#: net -> the file of torchvision's weights, and the smallest images that reach its last features
_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "vgg": ("vgg16-397923af.pth", 16),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
}
_MISSING = 'LPIPSLoss needs the package lpips: pip install "esc-arch[lpips]", or leave this loss out'


class LPIPSLoss(ImageLoss):
    """Learned perceptual distance (Zhang et al., 2018, arXiv 1801.03924), the mean over images.

    Needs the package lpips (``pip install "esc-arch[lpips]"``), and its backbone's weights, which torchvision
    downloads once.

    Args:
        loss_weight: see `ImageLoss`.
        net: the backbone: alex, vgg or squeeze. Its authors recommend alex to measure and vgg to train.

    Raises:
        ValueError: an invalid net.
        UserError: lpips is not installed, or the backbone's weights cannot be downloaded.
    """

    def __init__(self, loss_weight: float = 1.0, net: str = "vgg") -> None:
        super().__init__(loss_weight)
        if net not in _BACKBONES:
            raise ValueError(_unknown(net))
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
            yield _unknown(net)
        if importlib.util.find_spec("lpips") is None:
            yield _MISSING

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        distance: Tensor = self.net(2 * pred - 1, 2 * target - 1)  # it takes values in -1 .. 1
        return distance.mean()


def _unknown(net: object) -> str:
    return f"net is {net!r}; LPIPSLoss takes {', '.join(_BACKBONES)}."
