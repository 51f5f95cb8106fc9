"""What BasicSR's MODEL_REGISTRY sees: the ESC-specific part of training, validation and saving."""

import basicsr  # noqa: F401  first: what comes with it imports modules of this package

from .esc_lte_model import ESCLTEModel
from .esc_model import ESCModel
from .real_models import ESCRealGANModel, ESCRealMSEModel

__all__ = ["ESCLTEModel", "ESCModel", "ESCRealGANModel", "ESCRealMSEModel"]
