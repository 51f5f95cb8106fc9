"""Padding a map to whole windows, cutting it into windows of tokens, and putting it back together."""

from __future__ import annotations

import torch
from torch import Tensor

from esc_arch.ops.padding import at_least, reflect_pad

__all__ = ["merge_windows", "pad_to_windows", "split_windows"]


def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """Pad a map (B, C, H, W) at the bottom and the right by reflection to whole windows."""
    height, width = x.shape[-2:]
    bottom = count_windows(height, window) * window - height
    right = count_windows(width, window) * window - width
    return reflect_pad(x, 0, right, 0, bottom)


def count_windows(size: int, window: int) -> int:
    """How many windows cover `size` pixels.

    While exporting at least two, the second one for nothing: an exported program cannot hold for one window and for
    several, because the layout of the tensors differs. Windows do not see each other, so the result is the same.
    """
    return at_least((size + window - 1) // window, 2 if torch.compiler.is_exporting() else 1)


def split_windows(qkv: Tensor, window: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a padded projection into windows.

    Args:
        qkv: (B, 3C, H, W) with H and W multiples of `window`; channels in the order q, k, v, inside each heads,
            then head dimension.

    Returns:
        q, k and v, each (B * G, h, N, d), tokens in row-major order.
    """
    batch, channels, height, width = qkv.shape
    head_dim = channels // (3 * heads)
    x = qkv.reshape(batch, 3, heads, head_dim, height // window, window, width // window, window)
    x = x.permute(1, 0, 4, 6, 2, 5, 7, 3)  # 3, B, rows and columns of windows, h, token row, token column, d
    q, k, v = x.reshape(3, -1, heads, window * window, head_dim)
    return q, k, v


def merge_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Put windows back together and cut the padding off: the inverse of `split_windows` on one of its parts.

    Args:
        x: (B * G, h, N, d).
        height, width: of the map before padding.

    Returns:
        (B, h * d, H, W).
    """
    _, heads, _, head_dim = x.shape
    rows, columns = count_windows(height, window), count_windows(width, window)
    x = x.reshape(-1, rows, columns, heads, window, window, head_dim)
    x = x.permute(0, 3, 6, 1, 4, 2, 5)  # B, h, d, window row, token row, window column, token column
    x = x.reshape(-1, heads * head_dim, rows * window, columns * window)
    if torch.compiler.is_exporting():
        pixel_rows, pixel_columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        return x.index_select(2, pixel_rows).index_select(3, pixel_columns)
    return x[:, :, :height, :width]
