"""Is a gradient wanted?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wants_gradients"]


def wants_gradients(*tensors: Tensor | None) -> bool:
    """True if gradients are recorded and one of the tensors requires one; None stands for an omitted tensor."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
