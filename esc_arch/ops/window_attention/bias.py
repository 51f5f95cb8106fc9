"""Position biases: from what a network stores to one number for each pair of tokens."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Bias", "dense_bias", "parameters_of", "relative_index"]

#: Either a table by relative position, (h, (2w - 1)^2), or two factors, (h, N, r) each, whose product is the bias
#: (arXiv 2603.06738).
Bias = Tensor | tuple[Tensor, Tensor]


def dense_bias(bias: Bias, window: int) -> Tensor:
    """The bias of every pair of tokens of a window: (h, N, N), rows are queries and columns are keys.

    Of a table it is bias[h, (qy, qx), (ky, kx)] = table[h, (ky - qy + w - 1) * (2w - 1) + (kx - qx + w - 1)]: a block
    Toeplitz matrix with Toeplitz blocks, so it consists of sliding w x w windows over the table. No index of N * N
    numbers is needed, neither here nor in the gradient.
    """
    if not isinstance(bias, Tensor):
        q_factors, k_factors = bias
        return q_factors @ k_factors.transpose(-2, -1)
    side = 2 * window - 1
    # (h, i, j, ky, kx) = table[i + ky, j + kx], which is the bias for i = w - 1 - qy and j = w - 1 - qx
    sliding = bias.view(-1, side, side).unfold(1, window, 1).unfold(2, window, 1)
    return sliding.flip(1, 2).reshape(-1, window * window, window * window)


def parameters_of(bias: Bias) -> tuple[Tensor, ...]:
    """The tensors a bias consists of."""
    return (bias,) if isinstance(bias, Tensor) else bias


def relative_index(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Bias-table index of token pairs, from their indices in the window (any equal shapes)."""
    rows = key // window - query // window + window - 1
    columns = key % window - query % window + window - 1
    return rows * (2 * window - 1) + columns
