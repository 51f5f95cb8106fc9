"""What makes training ESC-Real small: stand-ins for VGG19, whose weights are 575 MB, and for images of 400 x 400."""

from __future__ import annotations

from typing import Any

import pytest
from basicsr.archs import vgg_arch
from basicsr.data.realesrgan_dataset import RealESRGANDataset
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

__all__ = ["small_vgg19", "use_small_images", "use_small_vgg19"]

#: A few pixels more than the kernels need after Real-ESRGAN's strongest reduction.
SIDE = 96


def small_vgg19(pretrained: bool) -> nn.Module:
    """The layers of torchvision's VGG19 with a sixteenth of the channels, and random weights."""
    return nn.ModuleDict({"features": make_layers([n if isinstance(n, str) else n // 16 for n in cfgs["E"]])})


def use_small_vgg19(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let BasicSR's perceptual loss use it."""
    monkeypatch.setattr(vgg_arch.vgg, "vgg19", small_vgg19)


def use_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut RealESRGANDataset's images, whose sharpening would take a second each."""
    original = RealESRGANDataset.__getitem__

    def getitem(self: RealESRGANDataset, index: int) -> dict[str, Any]:
        item = original(self, index)
        return item | {"gt": item["gt"][:, :SIDE, :SIDE]}

    monkeypatch.setattr(RealESRGANDataset, "__getitem__", getitem)
