"""ESC-FP ("fewer parameters"): ESC with decomposed convolutional attention (arXiv 2503.06671)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.archs.base import ESCFamily
from esc_arch.modules import DecomposedConvAttn, LayerNorm
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.conv_attn import new_decomposed_kernel
from esc_arch.modules.fused import conv3x3

from .heads import Head, Region
from .shapes import Shapes

__all__ = ["ESCFP"]


@dataclass(eq=False, repr=False)
class ESCFP(ESCFamily):
    """ESC whose large kernel is a channel mixing and one depth-wise filter, shared by all blocks.

    Shapes, guarantees and errors as of `ESC`. The result is added to bicubic enlargement of the input.

    Args:
        pdim: channels that the convolutional attention works on, at least 4.
        others: see `ESC`.
    """

    head_margin = 2
    published_defaults: ClassVar[dict[str, Any]] = {"exp_ratio": 2}

    dim: int = 48
    num_heads: int = 3
    use_ln: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lk_channel, self.lk_spatial = new_decomposed_kernel(self.pdim, self.kernel_size)
        self.proj = Conv3x3(3, self.dim)
        self.blocks = self.new_blocks(first_exp_ratio=1.5)
        self.ln_last = LayerNorm(self.dim)
        self.last = Conv3x3(self.dim, self.dim)
        self.to_img = Conv3x3(self.dim, 3 * self.upscaling_factor**2)

    def new_conv_attn(self) -> DecomposedConvAttn:
        return DecomposedConvAttn(dim=self.dim, pdim=self.pdim, kernel_size=self.kernel_size)

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
        rows = bicubic_places(region.top, region.bottom, self.align)
        columns = bicubic_places(region.left, region.right, self.align)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None].to(image.device)
        # In float64 the places stay what they are while they become those of this part
        enlarged = F.grid_sample(image.double(), grid, mode="bicubic", padding_mode="border", align_corners=False)
        return residual + enlarged.float()


def bicubic_places(first: int, last: int, scale: int) -> Tensor:
    """Where the pixels that enlarge first .. last - 1 of a side are read, -1 .. 1 in this part of it; float64.

    `F.interpolate` computes a place as scale * (i + 0.5) - 0.5 in float32 with one rounding: in wide images that is off
    by up to 0.001 pixels, and differs from pixel to pixel.
    """
    index = torch.arange(first * scale, last * scale, dtype=torch.float64)
    inverse = torch.tensor(1 / scale, dtype=torch.float32).double()
    place = (inverse * (index + 0.5) - 0.5).float().double()
    return (place - first + 0.5) * (2 / (last - first)) - 1
