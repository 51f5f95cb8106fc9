"""What the files that offer the C++ operators to Python share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops import cpu

__all__ = ["empty_map", "input_reasons", "register"]


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


def _keep_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    keep: Callable[..., None] = _keep_inputs,
    *,
    second_derivatives: bool = False,
) -> None:
    """Tell PyTorch about an operator, once it is loaded.

    Args:
        fake: empty tensors like its results.
        backward, keep: see `torch.library.register_autograd`; gradients that are not wanted are dropped.
        second_derivatives: `backward` can be differentiated.
    """

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not second_derivatives:
            raise RuntimeError(
                f"the C++ {name} has no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True."
            )
        assert backward is not None  # or this is not registered
        found = zip(backward(ctx, *gradients), ctx.needs_input_grad, strict=True)
        return tuple(gradient if wanted else None for gradient, wanted in found)

    @cpu.when_loaded
    def tell() -> None:
        if not hasattr(torch.ops.esc_arch, name):  # ESC_ARCH_NATIVE_SOURCES may leave it out
            return
        torch.library.register_fake(f"esc_arch::{name}", fake)
        if backward is not None:
            torch.library.register_autograd(f"esc_arch::{name}", differentiate, setup_context=keep)
