"""Layer normalisation of maps over their channels, without parameters."""

from .api import layer_norm

__all__ = ["layer_norm"]
