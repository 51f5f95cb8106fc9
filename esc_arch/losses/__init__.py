"""Losses beyond BasicSR's, for its registry."""

from .image_losses import FFTLoss, ImageLoss, LPIPSLoss, SSIMLoss

__all__ = ["FFTLoss", "ImageLoss", "LPIPSLoss", "SSIMLoss"]
