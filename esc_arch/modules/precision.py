"""What mixed precision leaves in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["in_float32"]

Method = TypeVar("Method", bound=Callable[..., Any])


def in_float32(method: Method) -> Method:
    """A method of a module that autocast is not to touch: under it, tensors it gets are made float32 first.

    For sums over many numbers (LayerNorm, global pools) and for coordinates, which 8 or 11 bits would spoil, and
    which cost little compared with the convolutions. Without autocast nothing changes, whatever the type.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = next(self.parameters()).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            floats = (a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            return method(self, *floats, **kwargs)

    return run  # type: ignore[return-value]
