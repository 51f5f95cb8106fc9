"""The readable reference: a line for each step. Keeps five hidden maps for the backward pass."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    dwc_weight: Tensor,
    dwc_bias: Tensor,
    aggr_weight: Tensor,
    aggr_bias: Tensor,
) -> Tensor:
    """aggr(gelu(dwc(h)) + h) with h = gelu(proj(x)); see `conv_ffn`."""
    x = F.gelu(F.conv2d(x, proj_weight, proj_bias))
    x = F.gelu(F.conv2d(x, dwc_weight, dwc_bias, padding=1, groups=dwc_weight.shape[0])) + x
    return F.conv2d(x, aggr_weight, aggr_bias)
