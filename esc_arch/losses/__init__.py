"""Losses beyond BasicSR's, for its registry."""

from .image_losses import FFTLoss, ImageLoss, SSIMLoss
from .lpips import LPIPSLoss

__all__ = ["FFTLoss", "ImageLoss", "LPIPSLoss", "SSIMLoss"]
