"""Whether what is computed will have to be differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wants_gradients"]


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded, and one of the tensors needs its own; None stands for what is left out."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
