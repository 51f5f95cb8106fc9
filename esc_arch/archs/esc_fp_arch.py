"""ESC-FP ("fewer parameters"): ESC with decomposed convolutional attention (arXiv 2503.06671)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.archs.base import Body, ESCFamily
from esc_arch.modules import DecomposedConvAttn, LayerNorm
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.conv_attn import new_decomposed_kernel
from esc_arch.modules.fused import conv3x3

from .heads import Head, Region
from .shapes import Shapes

__all__ = ["ESCFP"]


class ESCFP(ESCFamily):
    """ESC whose large kernel is a channel mixing and one depth-wise filter, shared by all blocks.

    Shapes, guarantees and errors as of `ESC`. The result is added to bicubic enlargement of the input.

    Args:
        pdim: channels that the convolutional attention works on, at least 4.
        others: see `ESC`.
    """

    published_defaults: ClassVar = {"exp_ratio": 2}

    def __init__(
        self,
        dim: int = 48,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 5,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 3,
        upscaling_factor: int = 4,
        exp_ratio: float = 1.25,
        attn_type: str = "auto",
        *,
        flashbias_rank: int | None = None,
        rank: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(window_size=window_size, upscaling_factor=upscaling_factor)
        self.lk_channel, self.lk_spatial = new_decomposed_kernel(pdim, kernel_size)
        body = Body(
            dim, pdim, kernel_size, conv_blocks, window_size, num_heads, exp_ratio,
            attn_type, True, flashbias_rank, rank, backend,
        )  # fmt: skip
        self.proj = Conv3x3(3, dim)
        self.blocks = body.blocks(
            n_blocks,
            first_exp_ratio=1.5,
            conv_attn=lambda: DecomposedConvAttn(dim=dim, pdim=pdim, kernel_size=kernel_size),
        )
        self.ln_last = LayerNorm(dim)
        self.last = Conv3x3(dim, dim)
        self.to_img = Conv3x3(dim, 3 * self.upscaling_factor**2)

    def large_kernels(self) -> tuple[Tensor, ...]:
        """The channel mixing (pdim, pdim, 1, 1) and the depth-wise filter (pdim, 1, K, K)."""
        return self.lk_channel, self.lk_spatial

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        feat = conv3x3(self.last, feat, norm=self.ln_last, residual=shallow)
        enlarged = F.interpolate(image, scale_factor=self.upscaling_factor, mode="bicubic", align_corners=False)
        return (F.pixel_shuffle(conv3x3(self.to_img, feat), self.upscaling_factor) + enlarged).contiguous()

    def head(self, *sizes: tuple[int, int]) -> Head:
        return _BicubicHead(self, *sizes)

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "lk_spatial" not in shapes:
            return None
        return shapes.options(scale=shapes.subpixels("to_img.weight"), kernel="lk_spatial")


class _BicubicHead(Head):
    """The image that is added is enlarged here, as PyTorch places its pixels in the whole image."""

    def reconstruct(self, feat: Tensor, image: Tensor, region: Region) -> Tensor:
        residual = self.net.reconstruct(feat, self.net.shallow_features(image), torch.zeros_like(image))
        # Bicubic interpolation sees two pixels to each side, which the margin has; what is beyond is cropped
        rows = bicubic_matrix(region.top, region.bottom, self.size[0], self.align).to(image)
        columns = bicubic_matrix(region.left, region.right, self.size[1], self.align).to(image)
        with torch.autocast(image.device.type, enabled=False):
            return residual + rows @ image @ columns.T


def bicubic_matrix(first: int, last: int, length: int, scale: int) -> Tensor:
    """The matrix that enlarges pixels first .. last - 1 of a side as `F.interpolate(mode="bicubic")` does the whole.

    PyTorch computes where a pixel lies as scale * (i + 0.5) - 0.5 in float32 with one rounding: in wide images that is
    off by up to 0.001 pixels, and differs from pixel to pixel.

    Returns:
        ((last - first) * scale, last - first), float32. Pixels beyond these count as the outermost ones.
    """
    index = torch.arange(first * scale, last * scale, dtype=torch.float64)
    inverse = torch.tensor(1 / scale, dtype=torch.float32).double()
    place = (inverse * (index + 0.5) - 0.5).float()
    before = place.floor()
    t = (place - before)[:, None]
    distance = torch.cat([t + 1, t, 1 - t, 2 - t], dim=1)
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    pixels = (before.long()[:, None] + torch.arange(-1, 3)).clamp(0, length - 1)
    matrix = torch.zeros(len(index), last - first)
    weights = torch.where(distance <= 1, near, far)
    return matrix.scatter_add_(1, (pixels - first).clamp(0, last - first - 1), weights)
