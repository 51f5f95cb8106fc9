"""ESC-FP ("fewer parameters"): ESC with decomposed convolutional attention (arXiv 2503.06671)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from esc_arch.archs.base import Body, ESCFamily
from esc_arch.modules import DecomposedConvAttn, LayerNorm
from esc_arch.modules.conv3x3 import Conv3x3, conv3x3
from esc_arch.modules.conv_attn import new_decomposed_kernel

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

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "lk_spatial" not in shapes:
            return None
        return shapes.options(scale=shapes.subpixels("to_img.weight"), kernel="lk_spatial")
