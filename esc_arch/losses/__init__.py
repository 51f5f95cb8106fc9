"""Losses beyond BasicSR's, in its registry, and any number of them for one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from basicsr.losses import build_loss
from torch import nn

from .base import ImageLoss
from .fft import FFTLoss
from .lpips import LPIPSLoss
from .ssim import SSIMLoss

__all__ = ["FFTLoss", "ImageLoss", "LPIPSLoss", "SSIMLoss", "build_losses"]


def build_losses(train_options: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """The losses of `train: losses`, by their names there; empty without that section.

    Each is called as loss(pred, target), (B, C, H, W) both, and returns a scalar, its weight included.

    Raises:
        UserError: LPIPS cannot be had, see `LPIPSLoss`.
        ValueError: a value that a loss does not take.
    """
    return {name: build_loss(section).to(device) for name, section in (train_options.get("losses") or {}).items()}
