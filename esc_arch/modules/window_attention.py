"""Window attention with its projections and its position bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esc_arch.ops.window_attention import resolve_backend, window_attention

__all__ = ["FlashWindowAttention"]


class FlashWindowAttention(nn.Module):
    """Exact self-attention in window_size x window_size windows, no shift, learned relative position bias.

    Shapes: (B, dim, H, W) -> (B, dim, H, W), any H, W >= 1 (padded by reflection inside).

    Args:
        dim: channels.
        window_size: side of a window in pixels (32 in the paper).
        num_heads: heads; divides dim.
        attn_type: how it is computed, which changes no result: auto, naive, sdpa or flex, see
            `esc_arch.ops.window_attention`. Any case.

    Raises:
        ValueError: num_heads does not divide dim, a size below 1, an unknown attn_type.
        RuntimeError: at the call, when attn_type names a backend that cannot take the inputs.
    """

    def __init__(self, *, dim: int, window_size: int, num_heads: int, attn_type: str = "auto") -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"window_size is {window_size}; it must be at least 1 (the paper's is 32).")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim}.")
        self.window_size = window_size
        self.num_heads = num_heads
        self.attn_type = resolve_backend(attn_type)
        self.relative_position_bias = nn.Parameter(torch.randn(num_heads, (2 * window_size - 1) ** 2) * 0.001)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.to_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        attended = window_attention(
            self.to_qkv(x),
            self.relative_position_bias,
            window=self.window_size,
            heads=self.num_heads,
            backend=self.attn_type,
        )
        return self.to_out(attended)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}, attn_type={self.attn_type}"
