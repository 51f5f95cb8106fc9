"""ConvAttn, the paper's convolutional attention (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esc_arch.ops.conv_attn import conv_attention, symmetrise

__all__ = ["ConvAttn", "new_large_kernel"]

DYNAMIC_KERNEL_SIZE = 3


def new_large_kernel(pdim: int, kernel_size: int) -> nn.Parameter:
    """A free large-kernel filter (pdim, pdim, K, K), initialised orthogonally. Convolve with `symmetrise` of it.

    Raises:
        ValueError: `kernel_size` is even, so that it has no centre.
    """
    _check_kernel_size(kernel_size)
    kernel = nn.Parameter(torch.empty(pdim, pdim, kernel_size, kernel_size))
    nn.init.orthogonal_(kernel)
    return kernel


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and at least 1 (the paper's is 13).")


class DynamicKernel(nn.Module):
    """A 3 x 3 depth-wise kernel computed from the whole image, one for each image of the batch.

    Shapes: (B, pdim, H, W) -> (B, pdim, 3, 3).
    """

    def __init__(self, pdim: int) -> None:
        super().__init__()
        to_kernel = nn.Conv2d(pdim // 2, pdim * DYNAMIC_KERNEL_SIZE**2, 1)
        for parameter in to_kernel.parameters():  # training starts from the static kernel alone
            nn.init.zeros_(parameter)
        self.dwc_proj = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(pdim, pdim // 2, 1), nn.GELU(), to_kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwc_proj(x).reshape(x.shape[0], x.shape[1], DYNAMIC_KERNEL_SIZE, DYNAMIC_KERNEL_SIZE)


class ConvAttn(nn.Module):
    """A large static kernel plus a small one computed from the image, on the first `pdim` channels.

    The other channels pass through; a 1 x 1 convolution then mixes all. The large kernel is one tensor for a whole
    network, so it is handed in.

    Shapes: x (B, dim, H, W), lk (pdim, pdim, K, K) -> (B, dim, H, W).

    Args:
        dim: channels.
        pdim: channels that are convolved.
        kernel_size: K of the large kernel, odd.
        own_kernel: have a large kernel `plk_filter` of its own, symmetrised as ESC's is, for use in other networks
            as a layer by itself; `lk` is then not needed.

    Raises:
        ValueError: `pdim` is not within 2 .. dim, `kernel_size` is even; at the call: `lk` is missing or does not fit.
    """

    def __init__(self, *, dim: int, pdim: int, kernel_size: int = 13, own_kernel: bool = False) -> None:
        super().__init__()
        if not 2 <= pdim <= dim:
            raise ValueError(f"pdim is {pdim}; it must be between 2 and dim = {dim}.")
        _check_kernel_size(kernel_size)
        self.pdim = pdim
        self.kernel_size = kernel_size
        self.plk_filter = new_large_kernel(pdim, kernel_size) if own_kernel else None
        self.plk = DynamicKernel(pdim)
        self.aggr = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, lk: Tensor | None = None) -> Tensor:
        if lk is None:
            if self.plk_filter is None:
                raise ValueError("this ConvAttn has no large kernel: pass lk, or build it with own_kernel: true.")
            lk = symmetrise(self.plk_filter)
        expected = (self.pdim, self.pdim, self.kernel_size, self.kernel_size)
        if tuple(lk.shape) != expected:
            raise ValueError(f"the large kernel has shape {tuple(lk.shape)}; this layer needs {expected}.")
        convolved, passed = x[:, : self.pdim], x[:, self.pdim :]
        convolved = conv_attention(convolved, lk, self.plk(convolved))
        return self.aggr(torch.cat([convolved, passed], dim=1))
