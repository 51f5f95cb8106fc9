"""Checkpoints: read safely, recognised, checked before they are loaded, and converted.

A checkpoint is data, never code: only tensors and plain values are read. What does not fit is reported in full
instead of being skipped. `recognition` tells from the names and shapes of weights which network they are of.
(Converting needs the networks themselves, so `conversion` is not imported here.)
"""

from .loading import adapt_weights, describe_mismatch, load_weights, mismatch_message
from .reading import read_checkpoint, select_weights
from .recognition import recognise

__all__ = [
    "adapt_weights",
    "describe_mismatch",
    "load_weights",
    "mismatch_message",
    "read_checkpoint",
    "recognise",
    "select_weights",
]
