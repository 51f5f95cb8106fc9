"""The C++ operators: each map is read and written in the layout it has; see `csrc/layer_norm.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons, register
from esc_arch.ops.layout import dense_layout


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    return input_reasons(x, weight, bias)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`torch.ops.esc_arch.layer_norm_cpu`, whose result is channels_last where `x` is; see `layer_norm`."""
    return torch.ops.esc_arch.layer_norm_cpu(x, weight, bias, eps)


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """What an operator that normalises its input itself computed with, for its backward pass; without norm, x."""
    if weight is None:
        return x
    return torch.ops.esc_arch.layer_norm_cpu(x, weight, bias, eps)


def gradients_through(
    gradient: Tensor | None, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and of the norm's weight and bias, from that of `normalised`'s result, if it is wanted."""
    if gradient is None or weight is None:
        return gradient, None, None
    of_x, of_weight, of_bias = torch.ops.esc_arch.layer_norm_backward_cpu(gradient, x, weight, eps)
    return of_x, of_weight, of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.esc_arch.layer_norm_backward_cpu(gradient, *ctx.saved_tensors, ctx.eps), None


def _fake_backward(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=dense_layout(x)), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


register("layer_norm_cpu", lambda x, *parameters: torch.empty_like(x, memory_format=dense_layout(x)), _backward, _keep)
register("layer_norm_backward_cpu", _fake_backward)
