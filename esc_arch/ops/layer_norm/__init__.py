"""Layer normalisation of maps over their channels, without parameters."""

from .api import BACKENDS, layer_norm

__all__ = ["BACKENDS", "layer_norm"]
