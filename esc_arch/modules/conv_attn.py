"""ConvAttn, the paper's convolutional attention (arXiv 2503.06671), whole and decomposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esc_arch.ops.conv_attn import conv_attention, decomposed_conv_attention, symmetrise

from .precision import in_float32

__all__ = ["ConvAttn", "DecomposedConvAttn", "new_decomposed_kernel", "new_large_kernel"]

DYNAMIC_KERNEL_SIZE = 3


def new_large_kernel(pdim: int, kernel_size: int) -> nn.Parameter:
    """A free large-kernel filter (pdim, pdim, K, K), initialised orthogonally. Convolve with `symmetrise` of it.

    Raises:
        ValueError: `kernel_size` is even, so that it has no centre.
    """
    _check_kernel_size(kernel_size, least=1)
    kernel = nn.Parameter(torch.empty(pdim, pdim, kernel_size, kernel_size))
    nn.init.orthogonal_(kernel)
    return kernel


def new_decomposed_kernel(pdim: int, kernel_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The channel mixing (pdim, pdim, 1, 1), N(0, 1), and the depth-wise filter (pdim, 1, K, K), orthogonal.

    Raises:
        ValueError: `kernel_size` is even or below 3, so that the dynamic kernel has no place in it.
    """
    _check_kernel_size(kernel_size, least=DYNAMIC_KERNEL_SIZE)
    spatial = nn.Parameter(torch.empty(pdim, 1, kernel_size, kernel_size))
    nn.init.orthogonal_(spatial)
    return nn.Parameter(torch.randn(pdim, pdim, 1, 1)), spatial


def _check_kernel_size(kernel_size: int, least: int) -> None:
    if kernel_size < least or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and at least {least} (the paper's is 13).")


class _PooledKernel(nn.Module):
    """What computes a 3 x 3 depth-wise kernel from the whole image, one for each image of the batch.

    Shapes: (B, pdim, H, W) -> (B, pdim, 3, 3).

    Args:
        hidden: width.
        name: of the layers, as in published files.
    """

    dwc_proj: nn.Sequential

    def __init__(self, pdim: int, *, hidden: int, name: str) -> None:
        super().__init__()
        self.name = name
        layers = nn.Conv2d(pdim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, pdim * DYNAMIC_KERNEL_SIZE**2, 1)
        self.add_module(name, nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers))

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x).reshape(*x.shape[:2], DYNAMIC_KERNEL_SIZE, DYNAMIC_KERNEL_SIZE)


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
        symmetric: every `lk` handed in went through `symmetrise`, which lets faster algorithms be used. The gradient
            of `lk` may then have only its symmetric part; see `conv_attention`.

    `means`, (B, pdim), stand for those of the first `pdim` channels over all pixels, where x is a part of an image.

    Raises:
        ValueError: `pdim` is not within 2 .. dim, `kernel_size` is even; at the call: `lk` is missing or does not fit.
    """

    def __init__(
        self, *, dim: int, pdim: int, kernel_size: int = 13, own_kernel: bool = False, symmetric: bool = False
    ) -> None:
        super().__init__()
        _check_kernel_size(kernel_size, least=1)
        _check_pdim(pdim, least=2, dim=dim)
        self.pdim, self.kernel_size = pdim, kernel_size
        self.symmetric = symmetric
        self.plk_filter = new_large_kernel(pdim, kernel_size) if own_kernel else None
        self.plk = _PooledKernel(pdim, hidden=pdim // 2, name="dwc_proj")
        for parameter in self.plk.dwc_proj[3].parameters():  # training starts from the static kernel alone
            nn.init.zeros_(parameter)
        self.aggr = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, lk: Tensor | None = None, means: Tensor | None = None) -> Tensor:
        symmetric = self.symmetric or lk is None
        if lk is None:
            if self.plk_filter is None:
                raise ValueError("this ConvAttn has no large kernel: pass lk, or build it with own_kernel: true.")
            lk = symmetrise(self.plk_filter)
        _check_kernel("large kernel", lk, (self.pdim, self.pdim, self.kernel_size, self.kernel_size))
        dynamic = self.plk(_to_pool(x, self.pdim, means))
        return self.aggr(conv_attention(x, lk, dynamic, symmetric=symmetric))


class DecomposedConvAttn(nn.Module):
    """ConvAttn of ESC-FP: the large kernel is a channel mixing and one depth-wise filter (arXiv 2503.06671).

    Both are shared by the whole network, so they are handed in. The dynamic kernel is added to the depth-wise one's
    centre; it is computed before the channels are mixed.

    Shapes: x (B, dim, H, W), lk_channel (pdim, pdim, 1, 1), lk_spatial (pdim, 1, K, K) -> (B, dim, H, W).

    Args:
        dim: channels.
        pdim: channels that are convolved.
        kernel_size: K, odd and at least 3.
        own_kernel: have filters `lk_channel` and `lk_spatial` of its own, as `ConvAttn`'s.

    Raises:
        ValueError: as of `ConvAttn`; `pdim` is within 4 .. dim here.
    """

    def __init__(self, *, dim: int, pdim: int, kernel_size: int = 13, own_kernel: bool = False) -> None:
        super().__init__()
        _check_kernel_size(kernel_size, least=DYNAMIC_KERNEL_SIZE)
        _check_pdim(pdim, least=4, dim=dim)
        self.pdim, self.kernel_size = pdim, kernel_size
        self.lk_channel: nn.Parameter | None = None
        self.lk_spatial: nn.Parameter | None = None
        if own_kernel:
            self.lk_channel, self.lk_spatial = new_decomposed_kernel(pdim, kernel_size)
        self.plk = _PooledKernel(pdim, hidden=pdim // 4, name="proj")
        self.aggr = nn.Conv2d(dim, dim, 1)

    def forward(
        self,
        x: Tensor,
        lk_channel: Tensor | None = None,
        lk_spatial: Tensor | None = None,
        means: Tensor | None = None,
    ) -> Tensor:
        lk_channel = self.lk_channel if lk_channel is None else lk_channel
        lk_spatial = self.lk_spatial if lk_spatial is None else lk_spatial
        if lk_channel is None or lk_spatial is None:
            raise ValueError(
                "this DecomposedConvAttn has no large kernel: pass lk_channel and lk_spatial, or build it with "
                "own_kernel: true."
            )
        _check_kernel("channel kernel", lk_channel, (self.pdim, self.pdim, 1, 1))
        _check_kernel("spatial kernel", lk_spatial, (self.pdim, 1, self.kernel_size, self.kernel_size))
        convolved, passed = x[:, : self.pdim], x[:, self.pdim :]
        dynamic = self.plk(_to_pool(x, self.pdim, means))
        convolved = decomposed_conv_attention(convolved, lk_channel, lk_spatial, dynamic)
        return self.aggr(torch.cat([convolved, passed], dim=1))


def _to_pool(x: Tensor, pdim: int, means: Tensor | None) -> Tensor:
    """What the dynamic kernel is computed from: the convolved channels, or their means (B, pdim), which are their own.

    Where a gradient is to come back to a CPU, the means of all channels are taken: the gradient of a part of a map is a
    map of zeros first, which costs more.
    """
    cheaper = x.device.type == "cpu" and x.dtype == torch.float32 and x.requires_grad and torch.is_grad_enabled()
    if means is None and cheaper:
        means = x.mean((2, 3))[:, :pdim]
    return x[:, :pdim] if means is None else means[:, :, None, None]


def _check_pdim(pdim: int, least: int, dim: int) -> None:
    if not least <= pdim <= dim:
        raise ValueError(f"pdim is {pdim}; it must be between {least} and dim = {dim}.")


def _check_kernel(what: str, kernel: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(kernel.shape) != expected:
        raise ValueError(f"the {what} has shape {tuple(kernel.shape)}; this layer needs {expected}.")
