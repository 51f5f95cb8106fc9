"""The C++ operators: Winograd's convolution, with a quarter of the products; see `csrc/conv3x3.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons, register
from esc_arch.ops.layer_norm import cpu as layer_norm
from esc_arch.ops.layout import empty_map

#: Below these PyTorch's convolution is faster: a small map does not pay for the kernel's transform, nor few channels
#: for the map's.
FEWEST_PIXELS = 256
FEWEST_CHANNELS = 16


def unsupported_reasons(x: Tensor, *others: Tensor | None) -> list[str]:
    """Why the C++ operators cannot take these inputs, or had better not; `others` are parameters and the residual."""
    if reasons := input_reasons(*others, maps=[x]):  # first: sizes are not to be asked for while exporting
        return reasons
    if x.shape[0] * x.shape[2] * x.shape[3] < FEWEST_PIXELS or x.shape[1] < FEWEST_CHANNELS:
        return ["it is slower than PyTorch's convolution for so few pixels or channels"]
    return []


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.ops.esc_arch.conv3x3_cpu`; see `conv3x3`."""
    return torch.ops.esc_arch.conv3x3_cpu(x, weight, bias)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _bias = ctx.saved_tensors
    return _gradients(gradient, x, weight, *ctx.needs_input_grad)


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those that are wanted."""
    turned = forward(gradient, weight.flip(2, 3).transpose(0, 1), None) if of_x else None
    if not (of_weight or of_bias):
        return turned, None, None
    _, *of_parameters = torch.ops.aten.convolution_backward(
        gradient, x, weight, weight.shape[:1], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, of_weight, of_bias]
    )
    return turned, of_parameters[0], of_parameters[1]


def _keep_fused(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm_weight, norm_bias, ctx.eps, weight, *_ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight)


def _fused_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, weight = ctx.saved_tensors
    of_x, of_norm_weight, of_norm_bias, _, of_weight, of_bias, _ = ctx.needs_input_grad
    of_any_input = any((of_x, of_norm_weight, of_norm_bias))
    normal = layer_norm.normalised(x, norm_weight, norm_bias, ctx.eps) if of_weight else x
    of_normal, *of_parameters = _gradients(gradient, normal, weight, of_any_input, of_weight, of_bias)
    of_input = layer_norm.gradients_through(of_normal, x, norm_weight, ctx.eps)
    return *of_input, None, *of_parameters, gradient


def _fake_fused(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, *others: Tensor | None
) -> Tensor:
    return empty_map(x, weight.shape[0])


register("conv3x3_cpu", lambda x, weight, bias: empty_map(x, weight.shape[0]), _backward, second_derivatives=True)
register("conv3x3_fused_cpu", _fake_fused, _fused_backward, _keep_fused)
