"""PyTorch's own convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `conv3x3`."""
    return F.conv2d(x, weight, bias, padding=1)
