"""What BasicSR's MODEL_REGISTRY sees: the ESC-specific part of training, validation and saving."""

from .esc_model import ESCModel

__all__ = ["ESCModel"]
