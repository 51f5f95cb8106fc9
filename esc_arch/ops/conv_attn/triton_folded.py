"""The Triton kernels of `triton`, using that the large kernel is symmetric.

In types that tensor cores multiply, rows are folded: half the products, without moving more numbers. With all bits of
float32, which tensor cores cannot multiply, the products weigh most, and columns and diagonals are folded too: a sixth
of them, for more additions. This is reasoned; trials measure which is faster on a GPU.

Sums of pixels are rounded to their type once, which adds about as much error as rounding the output does. In float16
they must stay below 65504, so the pixels below half of that (an eighth with all folds).
"""

from __future__ import annotations

from torch import Tensor

from . import triton


def unsupported_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why these kernels cannot take these inputs."""
    reasons = triton.unsupported_reasons(x, large_kernel, dynamic_kernel, symmetric)
    if not symmetric:
        reasons.append("it needs a large kernel that is symmetric, as `symmetrise` makes it")
    return reasons


def auto_skip_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why `auto` leaves them to those who ask for them by name."""
    return triton.auto_skip_reasons(x, large_kernel, dynamic_kernel, symmetric, backend="triton_folded")


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> Tensor:
    """Both convolutions; see `conv_attention`."""
    return triton.forward(x, large_kernel, dynamic_kernel, symmetric, fold="auto")
