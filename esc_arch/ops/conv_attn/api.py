"""ConvAttn's two convolutions: check the inputs, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.ops.cpu import input_reasons
from esc_arch.ops.operation import Operation, SampleShapes, Size, check_shapes, normal, wants_gradients

from . import cpu, reference, triton
from .reference import symmetrise

__all__ = ["CONV_ATTN", "conv_attention", "conv_attention_fused", "decomposed_conv_attention"]


def _inputs(shapes: SampleShapes, size: Size) -> list[Tensor]:
    """A map of which the first channels are convolved, a symmetric large kernel, and the dynamic one."""
    (batch, height, width), pdim, side = size, shapes.pdim, shapes.kernel_size
    x, large, dynamic = normal((batch, shapes.channels, height, width), (pdim, pdim, side, side), (batch, pdim, 3, 3))
    return [x, symmetrise(large), dynamic]


def _arguments(shapes: SampleShapes, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    x, large, dynamic = tensors
    return x[:, : shapes.pdim], large, dynamic, True


SHAPES = {"x": "BCHW", "the large kernel": "CCKK", "the dynamic kernel": "BCkk"}

CONV_ATTN = Operation(
    name="ConvAttn",
    option="ConvAttn backend",
    backends={"reference": reference, "cpu": cpu, "triton": triton},
    # The kernels in Triton are taken where they have passed autotuning
    order=("cpu", "triton", "reference"),
    inputs=_inputs,
    arguments=_arguments,
    parts=("the result", "the gradient of the map", "the gradient of the large kernel", "that of the dynamic kernel"),
    roundings=1,
    # Backends may give the symmetric part of the large kernel's alone, which is all that networks use
    canonicalise=lambda number, gradient: symmetrise(gradient.double()) if number == 2 else gradient,
)


def conv_attention(
    x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, *, symmetric: bool = False, backend: str = "auto"
) -> Tensor:
    """One large static kernel for all images, plus a small depth-wise kernel of each image's own, zero padding.

    Both are for the first C channels; further ones stay as they are.

    Args:
        x: (B, D, H, W), D >= C, H, W >= 1, of any strides.
        large_kernel: (C, C, K, K) with K odd.
        dynamic_kernel: (B, C, k, k) with k odd: channel c of image b is filtered by dynamic_kernel[b, c].
        symmetric: `large_kernel` equals its mirror images in both directions and its transpose (in space), as
            `symmetrise` makes it; fast backends need this. The gradient of `large_kernel` may then have only its
            symmetric part, which is all that passes through `symmetrise`.
        backend: reference, cpu, triton or auto.

    Returns:
        (B, D, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend requested by name cannot take these inputs (the message lists every reason), or a
            kernel said to be symmetric is not (where the backend looks).
    """
    channels = large_kernel.shape[0]
    convolved, others = (x[:, :channels], x[:, channels:]) if x.dim() == 4 else (x, x)
    _check(convolved, large_kernel, dynamic_kernel)
    inputs = (convolved, large_kernel, dynamic_kernel, symmetric)
    chosen = CONV_ATTN.choose(backend, *inputs)
    if chosen is cpu:  # which passes the others through
        return cpu.forward(x, large_kernel, dynamic_kernel, symmetric)
    out: Tensor = chosen.forward(*inputs)
    return torch.cat([out, others], dim=1) if others.shape[1] else out


def conv_attention_fused(
    x: Tensor,
    residual: Tensor | None,
    large_kernel: Tensor,
    means: Tensor | None,
    proj1_weight: Tensor,
    proj1_bias: Tensor | None,
    proj2_weight: Tensor,
    proj2_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    symmetric: bool = False,
) -> Tensor | None:
    """ConvAttn and the addition of its residual in one operator, on the CPU; with gradients where `means` are None.

    The dynamic kernel is `proj2(gelu(proj1(means)))`, a 3 x 3 filter for each channel and image. The first channels go
    through `conv_attention`, the others stay as they are, and a 1 x 1 convolution mixes all.

    Args:
        x: (B, D, H, W), D >= C.
        residual: (B, D', H, W), added to the output; None for zero.
        large_kernel: (C, C, K, K), see `conv_attention`.
        means: (B, C), of the first C channels of the image that x is a part of; None for those of x.
        proj1_weight, proj1_bias: (E, C, 1, 1) and (E).
        proj2_weight, proj2_bias: (9 C, E, 1, 1) and (9 C), by channel, then row of the kernel, then column.
        weight, bias: (D', D, 1, 1) and (D').
        symmetric: see `conv_attention`.

    Returns:
        (B, D', H, W); None where no operator does it in one.

    Raises:
        ValueError: a large kernel that does not fit x.
        RuntimeError: it is said to be symmetric and is not, or shapes of the others do not fit.
    """
    _check(None, large_kernel, None)
    parameters = (proj1_weight, proj1_bias, proj2_weight, proj2_bias, weight, bias)
    training = wants_gradients(x, residual, large_kernel, means, *parameters)
    if (
        "cpu" not in CONV_ATTN.order
        or (training and means is not None)  # which get no gradient
        or cpu.kernel_reasons(symmetric, large_kernel.shape[-1])
        or input_reasons(large_kernel, means, *parameters, maps=[x, residual])
    ):
        return None
    if training:
        return torch.ops.esc_arch.conv_attention_fused_training_cpu(x, residual, large_kernel, *parameters)[0]
    return torch.ops.esc_arch.conv_attention_fused_cpu(x, residual, large_kernel, means, *parameters)


def decomposed_conv_attention(
    x: Tensor, channel_kernel: Tensor, spatial_kernel: Tensor, dynamic_kernel: Tensor
) -> Tensor:
    """Channel mixing, then a depth-wise kernel with the image's own added to its centre.

    Args:
        x: (B, C, H, W).
        channel_kernel: (C, C, 1, 1).
        spatial_kernel: (C, 1, K, K) with K odd, zero padding.
        dynamic_kernel: (B, C, k, k) with k odd, k <= K.

    Returns:
        (B, C, H, W).
    """
    margin = (spatial_kernel.shape[-1] - dynamic_kernel.shape[-1]) // 2
    kernel = F.pad(dynamic_kernel, (margin,) * 4) + spatial_kernel[None, :, 0]
    return cpu.per_image_depthwise(F.conv2d(x, channel_kernel), kernel)


def _check(x: Tensor | None, *kernels: Tensor | None) -> None:
    check_shapes(SHAPES, x, *kernels)
    for kernel in kernels:
        if kernel is not None and kernel.shape[-1] % 2 == 0:
            raise ValueError(f"a kernel has shape {tuple(kernel.shape)}; its sides must be odd.")
