"""PyTorch's fused attention, on every device. PyTorch chooses the kernel; none is forced."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .bias import Bias, dense_bias
from .windows import merge_windows, pad_to_windows, split_windows


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """`F.scaled_dot_product_attention` with the dense bias as its mask; see `window_attention`."""
    q, k, v = split_windows(pad_to_windows(qkv, window), window, heads)
    # Under autocast the projection is in half precision while the bias, made of parameters, is not
    mask = dense_bias(bias, window).to(q.dtype)[None]
    return merge_windows(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), window, *qkv.shape[-2:])
