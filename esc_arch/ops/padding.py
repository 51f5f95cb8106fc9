"""Padding by reflection, for maps of any size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["at_least", "reflect_pad", "reflect_pad_to_multiple"]


def reflect_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Pad a map by reflection.

    Where the map is larger than what is added this is `F.pad(mode="reflect")`. A smaller map, for which that is not
    defined, is reflected to and fro as often as needed (as `numpy.pad` does); a single row is repeated.

    Args:
        x: (B, C, H, W).
        left, right, top, bottom: rows or columns to add.

    Returns:
        (B, C, top + H + bottom, left + W + right).
    """
    height, width = x.shape[-2:]
    # While exporting, sizes may be symbols: indices hold for all of them, a branch for one alone
    if not torch.compiler.is_exporting() and max(left, right) < width and max(top, bottom) < height:
        return F.pad(x, (left, right, top, bottom), mode="reflect") if left or right or top or bottom else x
    return x.index_select(2, _reflected(height, top, bottom, x)).index_select(3, _reflected(width, left, right, x))


def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad a map (B, C, H, W) at the bottom and the right by reflection to the next multiples of `multiple`."""
    bottom, right = ((size + multiple - 1) // multiple * multiple - size for size in x.shape[-2:])
    return reflect_pad(x, 0, right, 0, bottom)


def at_least(number: int, bound: int) -> int:
    """The larger of the two, also where `number` is a symbol for sizes of all kinds, as it is while exporting."""
    larger: Any = torch.sym_max(number, bound) if torch.compiler.is_exporting() else max(number, bound)
    return larger


def _reflected(size: int, before: int, after: int, like: Tensor) -> Tensor:
    """-before .. size - 1 + after, going to and fro between 0 and size - 1 without repeating the ends."""
    index = torch.arange(before + size + after, device=like.device) - before
    # (As a tensor: exporters to ONNX take no symbol as a divisor)
    period = torch.full((), at_least(2 * size - 2, 1), device=like.device)
    index = index % period
    return torch.minimum(index, period - index)
