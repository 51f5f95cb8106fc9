"""What the files that offer the C++ operators to Python share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esc_arch.ops import cpu

__all__ = ["empty_map", "input_reasons", "only_wanted", "refuse_second_derivatives"]


def input_reasons(*tensors: Tensor | None, maps: Sequence[Tensor | None] = ()) -> list[str]:
    """Why a float32 operator cannot take these tensors; `maps` are to have their channels innermost, too."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return ["an exported network keeps the plain formula"]
    given = [tensor for tensor in (*maps, *tensors) if tensor is not None]
    reasons = []
    if others := {tensor.device.type for tensor in given} - {"cpu"}:
        reasons.append(f"it runs on cpu, not on {', '.join(sorted(others))}")
    if others := {str(tensor.dtype) for tensor in given} - {"torch.float32"}:
        reasons.append(f"it takes float32, not {', '.join(sorted(others))}")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast asks for half precision, and it computes in float32")
    if any(each is not None and each.stride(1) != 1 for each in maps):
        reasons.append("it takes maps with the channels innermost")
    return reasons or cpu.unsupported_reasons()


def empty_map(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty channels_last map of the size of x; `channels` default to those of x."""
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def only_wanted(gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asks for, None in place of the others."""
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def refuse_second_derivatives(operation: str) -> None:
    """Raise RuntimeError where the gradient itself is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the C++ {operation} has no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True."
        )
