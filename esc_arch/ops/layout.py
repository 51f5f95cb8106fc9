"""The order in which a map's numbers lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_layout", "empty_like", "empty_map", "fast_layout", "is_channels_last"]


def fast_layout(x: Tensor) -> Tensor:
    """The same map, in the layout in which a network runs fastest on its device: channels_last on the CPU.

    What follows keeps the layout of its input, so once is enough. Convolutions of PyTorch take it 3 to 20 times
    faster there where they are 1 x 1 or depth-wise, and so do the C++ operators.

    Args:
        x: (B, C, H, W).
    """
    # (An exported network is run by others, on other devices)
    if x.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def dense_layout(x: Tensor) -> torch.memory_format:
    """The layout that a dense map has, or that another one is copied to: NCHW, unless it is channels_last alone."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """True if the channels of a pixel lie side by side, also where x is the first channels of a wider map."""
    return x.stride(1) == 1 and x.shape[1] > 1


def empty_map(x: Tensor, channels: int | None = None, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """An empty dense map in the size of x; `channels` default to those of x."""
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """`empty_map` in the layout of x, which may be the first channels of a wider map."""
    return empty_map(x, channels, torch.channels_last if is_channels_last(x) else torch.contiguous_format)
