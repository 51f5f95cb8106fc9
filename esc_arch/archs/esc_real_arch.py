"""ESC-Real: networks for photographs with unknown degradations (arXiv 2503.06671)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import ClassVar

from torch import Tensor, nn

from esc_arch.archs.base import Body, SharedKernelNetwork
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.upsample import UPSAMPLERS, DySample, ReflectDepthwiseConv, UniversalUpsampler
from esc_arch.ops.padding import reflect_pad_to_multiple

__all__ = ["ESCReal", "ESCRealM"]


def _image_skip(channels: int, dim: int) -> list[nn.Module]:
    """The way of the image around the blocks, with a large kernel: (B, channels, H, W) -> (B, dim, H, W)."""
    return [
        nn.Conv2d(channels, 2 * dim, 1),
        ReflectDepthwiseConv(2 * dim, 7),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * dim, dim, 1),
    ]


class _RealNetwork(SharedKernelNetwork):
    """The body of both networks: ESC's with LayerNorms, and a second skip from the image."""

    subpixel_conv = None  # the tails are not one convolution

    #: In the published order of parameters, by which optimisers' states go.
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, body: Body, n_blocks: int, upscaling_factor: int) -> None:
        super().__init__(
            pdim=body.pdim,
            kernel_size=body.kernel_size,
            window_size=body.window_size,
            upscaling_factor=upscaling_factor,
        )
        for part in self.parts:  # each is made when its options are known, and keeps the place that it gets here
            self.register_module(part, None)
        self.blocks = body.blocks(n_blocks)
        self.last = Conv3x3(body.dim, body.dim)

    skip: nn.Module
    to_img: nn.Module

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        feat = conv3x3(self.last, feat, residual=shallow) + self.skip(image)
        return self.to_img(feat).contiguous()


class ESCReal(_RealNetwork):
    """The published ESC-Real, x4.

    Shapes: (B, 3, H, W) -> (B, 3, 4H, 4W). Guarantees and errors as of `ESC`.

    Args:
        upscaling_factor: 4; with use_dysample any whole number.
        use_dysample: enlarge with `DySample` instead of nearest neighbours and convolutions.
        others: see `ESC`.
    """

    parts = ("proj", "blocks", "last", "to_img", "skip")

    def __init__(
        self,
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 10,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        upscaling_factor: int = 4,
        exp_ratio: float = 2,
        attn_type: str = "auto",
        *,
        flashbias_rank: int | None = None,
        rank: int | None = None,
        backend: str = "auto",
        use_dysample: bool = False,
    ) -> None:
        body = Body(
            dim, pdim, kernel_size, conv_blocks, window_size, num_heads, exp_ratio,
            attn_type, True, flashbias_rank, rank, backend,
        )  # fmt: skip
        super().__init__(body, n_blocks, upscaling_factor)
        if not use_dysample and upscaling_factor != 4:
            raise ValueError(
                f"upscaling_factor is {upscaling_factor}; ESCReal enlarges by 4. ESCRealM takes 1 to 4, "
                f"use_dysample: true any."
            )
        self.proj = Conv3x3(3, dim)
        self.skip = nn.Sequential(*_image_skip(3, dim))
        self.to_img = DySample(dim, scale=self.upscaling_factor) if use_dysample else _nearest_tail(dim)


def _nearest_tail(dim: int) -> nn.Sequential:
    """ESC-Real's enlargement by 4: twice nearest neighbours and a convolution, then two more."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        Conv3x3(dim, dim),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        Conv3x3(dim, dim),
        nn.LeakyReLU(0.2),
        Conv3x3(dim, dim),
        nn.LeakyReLU(0.2),
        Conv3x3(dim, 3),
    )


class ESCRealM(_RealNetwork):
    """ESC-Real for scales 1 to 4, with a choice of upsamplers.

    Shapes: (B, 3, H, W) -> (B, 3, H * s, W * s), s = upscaling_factor. Guarantees and errors as of `ESC`; to export it
    with dynamic sizes and `unshuffle_mod`, make them multiples of 4 / s, from 8 / s on.

    Args:
        upscaling_factor: 1, 2, 3 or 4.
        upsampler: pixelshuffledirect, pixelshuffle, nearest+conv, dysample or transpose+conv, see
            `UniversalUpsampler`. At scale 1 without unshuffle_mod it is one convolution (conv), whatever is given.
        mid_dim: channels inside the upsamplers pixelshuffle and dysample.
        unshuffle_mod: for scales below 3, work on the image folded to a quarter or half of its size (padded by
            reflection to a multiple) and enlarge by 4.
        others: see `ESC`.
    """

    TAIL_SCALE = 4
    parts = ("proj", "skip", "blocks", "last", "to_img")

    published_defaults: ClassVar = {"upsampler": "nearest+conv"}

    to_img: UniversalUpsampler

    def __init__(
        self,
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 10,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        upscaling_factor: int = 4,
        exp_ratio: float = 2,
        attn_type: str = "auto",
        *,
        flashbias_rank: int | None = None,
        rank: int | None = None,
        backend: str = "auto",
        upsampler: str = "pixelshuffledirect",
        mid_dim: int = 48,
        unshuffle_mod: bool = True,
    ) -> None:
        body = Body(
            dim, pdim, kernel_size, conv_blocks, window_size, num_heads, exp_ratio,
            attn_type, True, flashbias_rank, rank, backend,
        )  # fmt: skip
        super().__init__(body, n_blocks, upscaling_factor)
        if upscaling_factor not in (1, 2, 3, 4):
            raise ValueError(f"upscaling_factor is {upscaling_factor}; ESCRealM takes 1, 2, 3 or 4.")
        unshuffle = unshuffle_mod and self.upscaling_factor < 3
        #: How many pixels of the image along each side become one of the features.
        self.folding = self.TAIL_SCALE // self.upscaling_factor if unshuffle else 1
        channels = 3 * self.folding**2
        proj = Conv3x3(channels, dim)
        skip = _image_skip(channels, dim)
        if unshuffle:
            self.proj = nn.Sequential(nn.PixelUnshuffle(self.folding), proj)
            self.skip = nn.Sequential(nn.PixelUnshuffle(self.folding), *skip)
        else:
            self.proj = proj
            self.skip = nn.Sequential(*skip)
        tail_scale = self.TAIL_SCALE if unshuffle else self.upscaling_factor
        if upsampler not in UPSAMPLERS:
            raise ValueError(f"upsampler {upsampler!r} is not known; allowed: {', '.join(UPSAMPLERS)}.")
        name = "conv" if tail_scale == 1 else upsampler
        self.to_img = UniversalUpsampler(name, scale=tail_scale, dim=dim, mid=mid_dim)

    def adapt_state_dict(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> list[str]:
        """Give weights of a tail, in place, this network's description of it: theirs may be absent or be wrong."""
        if any(name.startswith(f"{prefix}to_img.") for name in state_dict):
            state_dict[f"{prefix}to_img.MetaUpsample"] = self.to_img.MetaUpsample
        return super().adapt_state_dict(state_dict, prefix)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (size * self.upscaling_factor for size in x.shape[-2:])
        if self.folding > 1:
            x = reflect_pad_to_multiple(x, self.folding)
        return super().forward(x)[:, :, :height, :width]
