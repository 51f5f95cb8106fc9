"""How far a backend may be from the exact result, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["allowed_error", "largest_difference", "results"]

#: Roundings by which float32 sums over all pixels of a map differ with their order.
SUM_ROUNDINGS = 8


def results(
    compute: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *,
    gradients: bool = True,
    weights: Tensor | None = None,
    kind: torch.dtype | None = None,
) -> list[Tensor]:
    """What is computed of `tensors`, and the gradients of its sum with fixed weights.

    Args:
        compute: of as many tensors as there are, one in the type and layout that is wanted.
        gradients: otherwise without them, and nothing is kept for them.
        weights: in the shape of what is computed; the same random ones each time where there are none.
        kind: the type whose numbers these random ones are; that of what is computed where there is none.
    """
    leaves = [tensor.detach().requires_grad_(gradients) for tensor in tensors]
    with torch.set_grad_enabled(gradients):
        out = compute(*leaves)
    if not gradients:
        return [out]
    if weights is None:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind or out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.device, out.dtype))]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite when a number is not finite, so that NaN never passes."""
    error = (found.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    return error if math.isfinite(error) else math.inf


def allowed_error(expected: Tensor, plain_error: float, eps: float, *, roundings: int, factor: int = 2) -> float:
    """How far a backend may be from the exact result: twice as far as plain PyTorch, and some roundings.

    Args:
        expected: the exact result.
        plain_error: how far the readable reference is from it, computing in the same precision.
        eps: of the precision, see `torch.finfo`.
        roundings: of the largest number, or of 1: where all pixels are equal, gradients are differences that
            are exactly 0, and plain PyTorch may hit them. Those of sums in float32 are added.
        factor: in place of twice.
    """
    largest = max(1.0, expected.abs().max().item())
    return factor * plain_error + (roundings * eps + SUM_ROUNDINGS * torch.finfo(torch.float32).eps) * largest
