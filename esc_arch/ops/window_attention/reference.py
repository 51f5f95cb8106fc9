"""The readable reference: every step of the formula is a line. Needs a (G * B, h, N, N) tensor or three."""

from __future__ import annotations

from torch import Tensor

from .bias import Bias, dense_bias
from .windows import merge_windows, pad_to_windows, split_windows


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v in each window; see `window_attention`."""
    q, k, v = split_windows(pad_to_windows(qkv, window), window, heads)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + dense_bias(bias, window)
    # With a half-precision projection the scores are float32 from here on, the bias being so
    return merge_windows(scores.softmax(dim=-1).to(v.dtype) @ v, window, *qkv.shape[-2:])
