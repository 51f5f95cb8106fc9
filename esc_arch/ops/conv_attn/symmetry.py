"""Geometric re-parameterisation of the large kernel (arXiv 2503.06671)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["symmetrise"]


def symmetrise(kernel: Tensor) -> Tensor:
    """The average of a filter over the 8 symmetries of the square.

    They are the four flips (none, horizontal, vertical, both) and the same four after a rotation by 90 degrees,
    which are the transposes of the flips. Applying this twice changes nothing, not even a bit: the sums below are
    exactly symmetric, and a sum of eight equal numbers divided by eight is exact.

    Args:
        kernel: (..., K, K).

    Returns:
        (..., K, K), of whose K * K taps at most (n + 1)(n + 2) / 2 differ, n = K // 2 (28 of 169 for K = 13).
    """
    flipped = kernel + kernel.flip(-1)
    flipped = flipped + flipped.flip(-2)
    return (flipped + flipped.transpose(-2, -1)) / 8
