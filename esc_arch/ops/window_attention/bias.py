"""The relative position bias: from its table to one number for each pair of tokens."""

from __future__ import annotations

from torch import Tensor

__all__ = ["dense_bias", "relative_index"]


def dense_bias(table: Tensor, window: int) -> Tensor:
    """The bias of every pair of tokens of a window.

    bias[h, (qy, qx), (ky, kx)] = table[h, (ky - qy + w - 1) * (2w - 1) + (kx - qx + w - 1)]

    The bias is a block Toeplitz matrix with Toeplitz blocks, so it consists of sliding w x w windows over the
    table: no index of N * N numbers is needed, neither here nor in the gradient.

    Args:
        table: (h, (2w - 1)^2).
        window: w.

    Returns:
        (h, N, N), rows are queries and columns are keys.
    """
    heads = table.shape[0]
    side = 2 * window - 1
    # (h, i, j, ky, kx) = table[i + ky, j + kx], which is the bias for i = w - 1 - qy and j = w - 1 - qx
    sliding = table.view(heads, side, side).unfold(1, window, 1).unfold(2, window, 1)
    return sliding.flip(1, 2).reshape(heads, window * window, window * window)


def relative_index(query: Tensor, key: Tensor, window: int) -> Tensor:
    """The place in the table that pairs of tokens read, from their numbers in the window (any equal shapes)."""
    rows = key // window - query // window + window - 1
    columns = key % window - query % window + window - 1
    return rows * (2 * window - 1) + columns
