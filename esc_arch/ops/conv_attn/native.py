"""The C++ operators: the large convolution by fast Fourier transforms of tiles, the dynamic one in the same pass.

The transform of a kernel that is even in both directions is real and even, so a tile of N x N takes only
(N / 2 + 1)^2 real matrices of (C, C); see `csrc/conv_attn.cpp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops import native

#: Beyond this no tile has room for outputs beside its margins.
LARGEST_KERNEL = 33

#: Of the kernel that `conv_attention_step` computes from the image.
DYNAMIC_SIDE = 3


def reasons_against(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    return _reasons_against(large_kernel, dynamic_kernel.shape[-1], symmetric, (x, large_kernel, dynamic_kernel))


def _reasons_against(
    large_kernel: Tensor, dynamic_side: int, symmetric: bool, tensors: tuple[Tensor, ...]
) -> list[str]:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return ["an exported network keeps the plain formula"]
    reasons = []
    if any(tensor.device.type != "cpu" for tensor in tensors):
        reasons.append(f"it runs on cpu, not on {tensors[0].device.type}")
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        reasons.append(f"it takes float32, not {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}")
    if not symmetric:
        reasons.append("it needs a large kernel that is symmetric, as `symmetrise` makes it")
    if max(large_kernel.shape[-1], dynamic_side) > LARGEST_KERNEL:
        reasons.append(f"it takes kernels of at most {LARGEST_KERNEL} x {LARGEST_KERNEL}")
    return reasons or native.reasons_against()


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor) -> Tensor:
    """`torch.ops.esc_arch.conv_attention`; see `conv_attention`. Further channels of x stay as they are."""
    out: Tensor = torch.ops.esc_arch.conv_attention(x, large_kernel, dynamic_kernel)
    return out


def mixed_reasons_against(
    x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, weight: Tensor, bias: Tensor, symmetric: bool
) -> list[str]:
    """Why the 1 x 1 convolution cannot be taken into the same operator; see `mixed_conv_attention`."""
    others = (large_kernel, dynamic_kernel, weight, bias)
    return _reasons_against_inference(large_kernel, dynamic_kernel.shape[-1], symmetric, (x,), others)


def step_reasons_against(
    x: Tensor, residual: Tensor | None, large_kernel: Tensor, parameters: tuple[Tensor | None, ...], symmetric: bool
) -> list[str]:
    """Why one operator cannot do all of ConvAttn; `parameters` are the others of `conv_attention_step`."""
    maps = (x,) if residual is None else (x, residual)
    others = (large_kernel, *(tensor for tensor in parameters if tensor is not None))
    return _reasons_against_inference(large_kernel, DYNAMIC_SIDE, symmetric, maps, others)


def _reasons_against_inference(
    large_kernel: Tensor, dynamic_side: int, symmetric: bool, maps: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> list[str]:
    reasons = _reasons_against(large_kernel, dynamic_side, symmetric, (*maps, *others))
    if reasons:
        return reasons
    if torch.is_autocast_enabled("cpu"):
        reasons.append("it takes float32")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*maps, *others)):
        reasons.append("it has no backward pass")
    if any(tensor.stride(1) != 1 for tensor in maps):
        reasons.append("it takes maps with the channels innermost")
    return reasons


def mixed_forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.ops.esc_arch.mixed_conv_attention`; see `mixed_conv_attention`."""
    out: Tensor = torch.ops.esc_arch.mixed_conv_attention(x, large_kernel, dynamic_kernel, weight, bias)
    return out


def step_forward(
    x: Tensor, residual: Tensor | None, large_kernel: Tensor, parameters: tuple[Tensor | None, ...]
) -> Tensor:
    """`torch.ops.esc_arch.conv_attention_step`; see `conv_attention_step`."""
    out: Tensor = torch.ops.esc_arch.conv_attention_step(x, residual, large_kernel, *parameters)
    return out


def _empty_like(x: Tensor) -> Tensor:
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fake_mixed(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty_output(x, weight)


def _fake_step(x: Tensor, residual: Tensor | None, large_kernel: Tensor, *parameters: Tensor | None) -> Tensor:
    *_, weight, _bias = parameters
    assert weight is not None  # only biases may be left out
    return _empty_output(x, weight)


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_backward(
    gradient: Tensor, x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, of_x: bool, of_kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_large, of_dynamic = (
        torch.empty_like(kernel, memory_format=torch.contiguous_format) if of_kernels else x.new_empty(0)
        for kernel in (large_kernel, dynamic_kernel)
    )
    return _empty_like(x) if of_x else x.new_empty(0), of_large, of_dynamic


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = torch.ops.esc_arch.conv_attention_backward(
        gradient, *ctx.saved_tensors, needed[0], needed[1] or needed[2]
    )
    return tuple(value if wanted else None for value, wanted in zip(gradients, needed, strict=True))


@native.when_loaded
def _register() -> None:
    torch.library.register_fake("esc_arch::conv_attention", lambda x, large_kernel, dynamic_kernel: _empty_like(x))
    torch.library.register_fake("esc_arch::mixed_conv_attention", _fake_mixed)
    torch.library.register_fake("esc_arch::conv_attention_step", _fake_step)
    torch.library.register_fake("esc_arch::conv_attention_backward", _fake_backward)
    torch.library.register_autograd("esc_arch::conv_attention", _backward, setup_context=_keep_inputs)
