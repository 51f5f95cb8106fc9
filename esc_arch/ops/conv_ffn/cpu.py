"""The C++ operators: all steps in one pass over the map, hidden rows only in the cache; see `csrc/conv_ffn.cpp`.

Backward computes the hidden rows again instead of keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons, register
from esc_arch.ops.layer_norm import cpu as layer_norm
from esc_arch.ops.layout import empty_map


def unsupported_reasons(x: Tensor, *parameters: Tensor) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    return input_reasons(x, *parameters)


def forward(x: Tensor, *parameters: Tensor) -> Tensor:
    """`torch.ops.esc_arch.conv_ffn_cpu`, whose result is channels_last; see `conv_ffn`."""
    return torch.ops.esc_arch.conv_ffn_cpu(x, *parameters)


def _fake_fused(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    pooled: int = others[-1]
    return empty_map(x), x.new_empty(x.shape[0], pooled)


def _fake_backward(gradient: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *parameters, _of_x, _of_parameters = others
    return empty_map(x), *(x.new_empty(parameter.shape) for parameter in parameters), x.new_empty(x.shape[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_x, *of_parameters = ctx.needs_input_grad
    *inputs, _last_bias = ctx.saved_tensors
    return torch.ops.esc_arch.conv_ffn_backward_cpu(gradient, *inputs, of_x, any(of_parameters))


def _keep_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, ctx.eps, *parameters, _last_bias, _pooled = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, *parameters)


def _fused_backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, *parameters = ctx.saved_tensors
    of_norm, of_parameters = any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[4:-1])
    normal = layer_norm.normalised(x, norm_weight, norm_bias, ctx.eps)
    of_normal, *of_all = torch.ops.esc_arch.conv_ffn_backward_cpu(gradient, normal, *parameters, of_norm, of_parameters)
    of_input = layer_norm.gradients_through(of_normal if of_norm else None, x, norm_weight, ctx.eps)
    return *of_input, None, *of_all, None


register("conv_ffn_cpu", lambda x, *parameters: empty_map(x), _backward)
register("conv_ffn_fused_cpu", _fake_fused, _fused_backward, _keep_fused)
register("conv_ffn_backward_cpu", _fake_backward)
