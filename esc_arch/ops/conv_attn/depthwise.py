"""Depth-wise convolution with filters of each image's own, in C++ where it can run; see `csrc/depthwise.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu.wrapping import empty_map, input_reasons, register

from . import reference

__all__ = ["per_image_depthwise", "unsupported_reasons"]


def per_image_depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """The function of `reference`, by the C++ operator where nothing is against it."""
    if unsupported_reasons(x, kernel):
        return reference.per_image_depthwise(x, kernel)
    return torch.ops.esc_arch.depthwise_per_image(x, kernel)


def unsupported_reasons(x: Tensor, kernel: Tensor) -> list[str]:
    """Why the C++ operator cannot take these inputs."""
    return input_reasons(x, kernel)


def _fake_backward(gradient: Tensor, x: Tensor, kernel: Tensor, of_x: bool, of_kernel: bool) -> tuple[Tensor, Tensor]:
    of_kernels = torch.empty_like(kernel, memory_format=torch.contiguous_format) if of_kernel else x.new_empty(0)
    return empty_map(x) if of_x else x.new_empty(0), of_kernels


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.esc_arch.depthwise_per_image_backward(gradient, *ctx.saved_tensors, *ctx.needs_input_grad)


register("depthwise_per_image", lambda x, kernel: empty_map(x), _backward)
register("depthwise_per_image_backward", _fake_backward)
