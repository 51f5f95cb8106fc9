"""The C++ operators: the large convolution by fast Fourier transforms of tiles, the dynamic one in the same pass.

The transform of a kernel that is even in both directions is real and even, so a tile of N x N takes only
(N / 2 + 1)^2 real matrices of (C, C); see `csrc/conv_attn.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons, register
from esc_arch.ops.layout import empty_like, empty_map

from . import reference

#: Beyond this no tile has room for outputs between its margins.
LARGEST_KERNEL = 33

#: Of the kernel that `conv_attention_fused` computes from the image.
DYNAMIC_SIDE = 3


def unsupported_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    side = max(large_kernel.shape[-1], dynamic_kernel.shape[-1])
    return kernel_reasons(symmetric, side) or input_reasons(x, large_kernel, dynamic_kernel)


def kernel_reasons(symmetric: bool, side: int) -> list[str]:
    """Why they cannot take a large kernel, or one as large as the larger of both."""
    if not symmetric:
        return ["it needs a large kernel that is symmetric, as `symmetrise` makes it"]
    return [f"it takes kernels of at most {LARGEST_KERNEL} x {LARGEST_KERNEL}"] if side > LARGEST_KERNEL else []


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> Tensor:
    """`torch.ops.esc_arch.conv_attention_cpu`; see `conv_attention`. Further channels of x stay as they are."""
    return torch.ops.esc_arch.conv_attention_cpu(x, large_kernel, dynamic_kernel)


def per_image_depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """The function of `reference`, in C++ where nothing is against it; see `csrc/depthwise.cpp`."""
    if input_reasons(x, kernel):
        return reference.per_image_depthwise(x, kernel)
    return torch.ops.esc_arch.depthwise_per_image_cpu(x, kernel)


def _empty_output(x: Tensor, *others: Tensor | None) -> Tensor:
    *_, weight, _bias = others
    assert weight is not None  # only biases may be left out
    return empty_map(x, weight.shape[0])


def _fake_fused(
    x: Tensor, residual: Tensor | None, large_kernel: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    channels = large_kernel.shape[0]
    dynamic = x.new_empty(x.shape[0], channels, DYNAMIC_SIDE, DYNAMIC_SIDE)
    return _empty_output(x, *parameters), empty_map(x, channels), dynamic, x.new_empty(x.shape[0], channels)


def _fake_fused_backward(
    gradient: Tensor,
    x: Tensor,
    large_kernel: Tensor,
    proj1_weight: Tensor,
    proj1_bias: Tensor | None,
    proj2_weight: Tensor,
    weight: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    of_weights = (x.new_empty(s) for part in (proj1_weight, proj2_weight, weight) for s in (part.shape, part.shape[0]))
    return empty_map(x), x.new_empty(large_kernel.shape), *of_weights


def _fake_backward(empty: Callable[[Tensor], Tensor], gradient: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *kernels, of_x, of_kernels = others
    return empty(x) if of_x else x.new_empty(0), *(x.new_empty(k.shape if of_kernels else 0) for k in kernels)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_x, *of_kernels = ctx.needs_input_grad
    return torch.ops.esc_arch.conv_attention_backward_cpu(gradient, *ctx.saved_tensors, of_x, any(of_kernels))


def _keep_fused(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    x, _residual, large_kernel, proj1_weight, proj1_bias, proj2_weight, _proj2_bias, weight, _bias = inputs
    ctx.save_for_backward(x, large_kernel, proj1_weight, proj1_bias, proj2_weight, weight, *output[1:])


def _fused_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    of_x, *of_parameters = torch.ops.esc_arch.conv_attention_fused_backward_cpu(
        gradient, *ctx.saved_tensors, any(ctx.needs_input_grad[2:])
    )
    return of_x, gradient, *of_parameters


def _depthwise_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.esc_arch.depthwise_per_image_backward_cpu(gradient, *ctx.saved_tensors, *ctx.needs_input_grad)


register("conv_attention_cpu", lambda x, large_kernel, dynamic_kernel: empty_like(x), _backward)
register("conv_attention_backward_cpu", partial(_fake_backward, empty_like))
register("conv_attention_fused_cpu", _empty_output)
register("conv_attention_fused_training_cpu", _fake_fused, _fused_backward, _keep_fused)
register("conv_attention_fused_backward_cpu", _fake_fused_backward)
register("depthwise_per_image_cpu", lambda x, kernel: empty_map(x), _depthwise_backward)
register("depthwise_per_image_backward_cpu", partial(_fake_backward, empty_map))
