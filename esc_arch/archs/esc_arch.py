"""ESC: the base, light and XL networks of the paper (arXiv 2503.06671)."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from esc_arch.modules import ESCBlock, pixel_shuffle_with_skip, rescale_subpixel_conv
from esc_arch.modules.conv_attn import new_large_kernel
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.registry import register

__all__ = ["ESC"]


@register(ARCH_REGISTRY)
class ESC(nn.Module):
    """Super-resolution with convolutional attention and a few exact window attentions (paper, section 3).

    Shapes: (B, 3, H, W) -> (B, 3, H * s, W * s) with s = upscaling_factor, RGB in 0 .. 1, any H, W >= 1. The same
    in training and evaluation, and for each image of a batch as for the image alone. The input is not modified.

    The published figures pad the image itself before the network; that is the model's part (`ESCModel`).

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
        attn_type: auto, naive, sdpa or flex (any case); changes how attention is computed, not its result.
        use_ln: LayerNorm before the ConvFFNs (ESC-XL).

    Raises:
        ValueError: an option that cannot be, with the value and what is allowed.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 5,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        upscaling_factor: int = 4,
        exp_ratio: float = 1.25,
        attn_type: str = "auto",
        use_ln: bool = False,
    ) -> None:
        super().__init__()
        if upscaling_factor < 1 or upscaling_factor != int(upscaling_factor):
            raise ValueError(f"upscaling_factor is {upscaling_factor}; it must be a whole number of at least 1.")
        self.upscaling_factor = int(upscaling_factor)
        self.window_size = window_size
        self.plk_filter = new_large_kernel(pdim, kernel_size)
        self.proj = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            ESCBlock(
                dim=dim,
                pdim=pdim,
                kernel_size=kernel_size,
                conv_blocks=conv_blocks,
                window_size=window_size,
                num_heads=num_heads,
                exp_ratio=exp_ratio,
                attn_type=attn_type,
                use_ln=use_ln,
            )
            for _ in range(n_blocks)
        )
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.to_img = nn.Conv2d(dim, 3 * self.upscaling_factor**2, 3, padding=1)
        self.register_load_state_dict_pre_hook(_adapt_before_loading)

    def forward(self, x: Tensor) -> Tensor:
        lk = symmetrise(self.plk_filter)  # once for the whole network
        shallow = self.proj(x)
        feat = shallow
        for block in self.blocks:
            feat = block(feat, lk)
        feat = self.last(feat) + shallow
        return pixel_shuffle_with_skip(self.to_img(feat), x, self.upscaling_factor)

    @torch.no_grad()
    def fold(self) -> ESC:
        """Store the symmetrised large kernel in place of the free one, for inference; returns the network.

        The output stays the same, and so it does when folded again. Train the free kernel, not the folded one.
        """
        self.plk_filter.copy_(symmetrise(self.plk_filter))
        return self

    convert = fold  # the name that published scripts use

    def adapt_state_dict(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> list[str]:
        """Make a checkpoint of another scale fit this network, in place: `to_img` is interpolated.

        Called before every `load_state_dict`.

        Args:
            state_dict: weights of an ESC network.
            prefix: of the names in it that are this network's.

        Returns:
            What was done, a sentence each; empty for a checkpoint of the same scale.
        """
        notes = []
        channels = self.to_img.out_channels
        for name in ("weight", "bias"):
            key = f"{prefix}to_img.{name}"
            # BasicSR's loading with strict_load_g: false renames what does not fit
            if key not in state_dict and f"{key}.ignore" in state_dict:
                state_dict[key] = state_dict.pop(f"{key}.ignore")
            if key in state_dict and state_dict[key].shape[0] != channels:
                tensor = state_dict[key]
                try:
                    state_dict[key] = rescale_subpixel_conv(tensor, channels)
                except ValueError:
                    continue  # not a sub-pixel convolution: loading reports the shapes
                source = round((tensor.shape[0] / 3) ** 0.5)
                notes.append(f"{key} was interpolated from x{source} to x{self.upscaling_factor}.")
        return notes


def _adapt_before_loading(net: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(net, ESC)
    for note in net.adapt_state_dict(state_dict, prefix):
        logging.getLogger("basicsr").warning("The checkpoint is of another scale: %s", note)
