"""ESC: the base, light and XL networks of the paper (arXiv 2503.06671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from esc_arch.archs.base import SharedKernelNetwork
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.upsample import pixel_shuffle_with_skip

from .shapes import Shapes

__all__ = ["ESC"]


@dataclass(eq=False, repr=False)
class ESC(SharedKernelNetwork):
    """Super-resolution with convolutional attention and a few exact window attentions (arXiv 2503.06671).

    Shapes: (B, 3, H, W) -> (B, 3, H * s, W * s) with s = upscaling_factor, RGB in 0 .. 1, any H, W >= 1. The same
    in training and evaluation, and for each image of a batch as for the image alone. The input is not modified.

    For the published scores the image itself is padded before the network; that is the model's part (`ESCModel`).

    Args:
        dim: channels of the features.
        pdim: channels that ConvAttn convolves.
        kernel_size: side of the large kernel, odd.
        n_blocks: blocks.
        conv_blocks: pairs of ConvFFN and ConvAttn in a block.
        window_size: side of the attention windows in pixels.
        num_heads: heads of the attention; divides dim.
        upscaling_factor: s, an integer of at least 1.
        exp_ratio: expansion of the ConvFFNs.
        attn_type: auto, or a backend by name (any case); changes how attention is computed, not its result. FlashBias
            has factors of low rank in place of the bias tables, for attention kernels without bias support: scores =
            q k^T / sqrt(head_dim) + flashbias_q flashbias_k^T, as published. They start at zero, where gradients are
            zero, too: training starts from weights with tables, whose biases are decomposed when they are loaded.
        use_ln: LayerNorm before the ConvFFNs (ESC-XL).
        flashbias_rank: rank of FlashBias's factors, not used otherwise; None for 256 - head_dim, the widest that flash
            attention takes. Published networks have 48.
        rank: another name of flashbias_rank.
        backend: how attention of FlashBias is computed: auto, or a backend by name.

    All arguments up to attn_type may also be positional, in the published order.

    Raises:
        ValueError: an invalid option, with the value and what is allowed.
    """

    head_margin = 2
    published_defaults: ClassVar[dict[str, Any]] = {"exp_ratio": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.proj = Conv3x3(3, self.dim)
        self.blocks = self.new_blocks()
        self.last = Conv3x3(self.dim, self.dim)
        self.to_img = Conv3x3(self.dim, 3 * self.upscaling_factor**2)

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        feat = conv3x3(self.last, feat, residual=shallow)
        return pixel_shuffle_with_skip(conv3x3(self.to_img, feat), image, self.upscaling_factor)

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "to_img.weight" not in shapes or "lk_spatial" in shapes:
            return None
        return shapes.options(scale=shapes.subpixels("to_img.weight"), use_ln=shapes.use_ln)
