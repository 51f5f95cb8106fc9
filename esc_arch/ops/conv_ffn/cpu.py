"""The C++ operators: all steps in one pass over the map, hidden rows only in the cache; see `csrc/conv_ffn.cpp`.

Backward computes the hidden rows again instead of keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops import cpu
from esc_arch.ops.cpu.wrapping import empty_map, input_reasons, only_wanted, refuse_second_derivatives
from esc_arch.ops.gradients import wants_gradients
from esc_arch.ops.layer_norm import cpu as layer_norm


def unsupported_reasons(x: Tensor, *parameters: Tensor) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    return input_reasons(x, *parameters)


def forward(x: Tensor, *parameters: Tensor) -> Tensor:
    """`torch.ops.esc_arch.conv_ffn`, whose result is channels_last; see `conv_ffn`."""
    out: Tensor = torch.ops.esc_arch.conv_ffn(x, *parameters)
    return out


def step_unsupported_reasons(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, *parameters: Tensor
) -> list[str]:
    """Why the normalisation and the means cannot be taken into the same operator; see `conv_ffn_step`."""
    return input_reasons(norm_weight, norm_bias, *parameters, maps=[x])


def step_forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, *parameters: Tensor, pooled: int
) -> tuple[Tensor, Tensor | None]:
    """`torch.ops.esc_arch.conv_ffn_step`; see `conv_ffn_step`."""
    if wants_gradients(x, norm_weight, norm_bias, *parameters):
        out, _ = torch.ops.esc_arch.conv_ffn_step(x, norm_weight, norm_bias, eps, *parameters, 0)
        return out, None
    out, means = torch.ops.esc_arch.conv_ffn_step(x, norm_weight, norm_bias, eps, *parameters, pooled)
    return out, means


def _fake(x: Tensor, *parameters: Tensor) -> Tensor:
    return empty_map(x)


def _fake_step(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    pooled: int = others[-1]
    return empty_map(x), x.new_empty(x.shape[0], pooled)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    dwc_weight: Tensor,
    dwc_bias: Tensor,
    aggr_weight: Tensor,
    of_x: bool,
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    parameters = (proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight)
    of_all = [torch.empty_like(parameter, memory_format=torch.contiguous_format) for parameter in parameters]
    return empty_map(x), *of_all, x.new_empty(x.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])  # the last bias has no part in any gradient


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, ctx.eps, *parameters, _last_bias, _pooled = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, *parameters)


def _step_backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("ConvFFN")
    x, norm_weight, norm_bias, *parameters = ctx.saved_tensors
    of_norm, of_parameters = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:-1]
    normal = layer_norm.normalised(x, norm_weight, norm_bias, ctx.eps)
    of_normal, *of_all = torch.ops.esc_arch.conv_ffn_backward(
        gradient, normal, *parameters, any(of_norm), any(of_parameters)
    )
    of_input: tuple[Tensor | None, ...] = (None, None, None)
    if any(of_norm):
        of_input = layer_norm.gradients_through(of_normal, x, norm_weight, ctx.eps)
    found = (*of_input, None, *of_all, None)
    return only_wanted(found, ctx.needs_input_grad)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("ConvFFN")
    needed = ctx.needs_input_grad
    gradients = torch.ops.esc_arch.conv_ffn_backward(gradient, *ctx.saved_tensors, needed[0], any(needed[1:]))
    return only_wanted(gradients, needed)


@cpu.when_loaded
def _register() -> None:
    torch.library.register_fake("esc_arch::conv_ffn", _fake)
    torch.library.register_fake("esc_arch::conv_ffn_step", _fake_step)
    torch.library.register_fake("esc_arch::conv_ffn_backward", _fake_backward)
    torch.library.register_autograd("esc_arch::conv_ffn", _backward, setup_context=_keep_inputs)
    torch.library.register_autograd("esc_arch::conv_ffn_step", _step_backward, setup_context=_keep_step)
