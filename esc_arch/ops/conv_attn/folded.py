"""The dynamic kernel added into the centre of the static one: a single convolution, with a kernel for each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why the kernels cannot be added."""
    small, large = dynamic_kernel.shape[-1], large_kernel.shape[-1]
    return [f"a dynamic kernel of side {small} has no place in a large one of side {large}"] if small > large else []


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor) -> Tensor:
    """One convolution whose groups are the images; see `conv_attention`."""
    batch, channels, height, width = x.shape
    side = large_kernel.shape[-1]
    margin = (side - dynamic_kernel.shape[-1]) // 2
    dynamic = torch.diag_embed(dynamic_kernel.permute(0, 2, 3, 1)).permute(0, 3, 4, 1, 2)
    kernels = large_kernel + F.pad(dynamic, (margin,) * 4)
    out = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        kernels.reshape(batch * channels, channels, side, side),
        padding=side // 2,
        groups=batch,
    )
    return out.reshape(batch, channels, height, width)
