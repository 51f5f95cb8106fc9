"""ESC-Real: networks for photographs with unknown degradations (arXiv 2503.06671)."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from itertools import product
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from esc_arch.archs.base import SharedKernelNetwork
from esc_arch.errors import UserError
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.upsample import UPSAMPLERS, DySample, ReflectDepthwiseConv, UniversalUpsampler
from esc_arch.ops.padding import reflect_pad_to_multiple

from .heads import Head, Read, Region
from .shapes import Shapes, some

__all__ = ["ESCReal", "ESCRealM"]

META = "to_img.MetaUpsample"


def _image_skip(channels: int, dim: int) -> list[nn.Module]:
    """The way of the image around the blocks, with a large kernel: (B, channels, H, W) -> (B, dim, H, W)."""
    return [
        nn.Conv2d(channels, 2 * dim, 1),
        ReflectDepthwiseConv(2 * dim, 7),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * dim, dim, 1),
    ]


@dataclass(eq=False, repr=False)
class _RealNetwork(SharedKernelNetwork):
    """The body of both networks: ESC's with LayerNorms, and a second skip from the image."""

    subpixel_conv = None  # the heads are not one convolution
    head_margin = 6  # `skip`, which sees farther than `last`, and the upsampler pixelshuffle, which sees farthest
    real_world = True

    n_blocks: int = 10
    exp_ratio: float = 2
    use_ln: bool = field(default=True, init=False)
    last: Conv3x3 = field(init=False)
    skip: nn.Module = field(init=False)
    to_img: nn.Module = field(init=False)

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        return self.to_img(self.features(feat, shallow, image)).contiguous()

    def features(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        """What the upsampler starts from; see `reconstruct`."""
        return conv3x3(self.last, feat, residual=shallow) + self.skip(image)

    def head(self, *sizes: tuple[int, int]) -> Head:
        last = self.to_img[-1] if isinstance(self.to_img, nn.Sequential) else self.to_img
        return _DySampleHead(self, *sizes) if isinstance(last, DySample) else Head(self, *sizes)


class _DySampleHead(Head):
    """Resampling at places that the features determine: those are computed first, then what is there is read."""

    net: _RealNetwork
    prepares = True
    #: More pixels of the features than this, and more than a few times those of the region, are not read at a time.
    LEAST_READ = 64**2

    def __init__(self, net: _RealNetwork, *sizes: tuple[int, int]) -> None:
        super().__init__(net, *sizes)
        *narrowing, sampler = net.to_img if isinstance(net.to_img, nn.Sequential) else [net.to_img]
        self.sampler = cast(DySample, sampler)
        self.narrowing = nn.Sequential(*narrowing)

    def prepare(self, feat: Tensor, image: Tensor) -> Tensor:
        return self.narrowing(self.net.features(feat, self.net.shallow_features(image), image))

    def block(self, out: Region, features: Read, image: Read) -> Tensor:
        core = out.shrunk(self.align)
        places = self.sampler.places(features(core).float(), core[:2], self.size)
        # In pixels, rounded once as grid_sample does: in wide maps that is off by up to 0.001 pixels
        columns, rows = (
            ((place + 1).double() * (length / 2) - 0.5).float().clamp(0, length - 1)
            for place, length in zip(places, self.size[::-1], strict=True)
        )
        seen = Region(*(int(edge) for edge in (rows.min(), columns.min(), rows.max() + 2, columns.max() + 2)))
        seen = seen.expand(0, self.size)
        halves = out.halves(self.align)
        if halves is not None and seen.area > max(4 * core.area, self.LEAST_READ):
            parts = [self.block(half, features, image) for half in halves]
            return torch.cat(parts, dim=1 if halves[0].width == out.width else 2)
        # In float64 the places stay what they are while they become those of this part
        columns = (columns.double() - seen.left + 0.5) * (2 / seen.width) - 1
        rows = (rows.double() - seen.top + 0.5) * (2 / seen.height) - 1
        enlarged = self.sampler.sample(features(seen).double(), columns, rows)
        return out.crop(enlarged, core.times(self.align))[0].contiguous()


@dataclass(eq=False, repr=False)
class ESCReal(_RealNetwork):
    """The published ESC-Real, x4.

    Shapes: (B, 3, H, W) -> (B, 3, 4H, 4W). Guarantees and errors as of `ESC`.

    Args:
        upscaling_factor: 4; with use_dysample any whole number.
        use_dysample: enlarge with `DySample` instead of nearest neighbours and convolutions.
        others: see `ESC`.
    """

    _: KW_ONLY
    use_dysample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_dysample and self.upscaling_factor != 4:
            raise ValueError(
                f"upscaling_factor is {self.upscaling_factor}; ESCReal enlarges by 4. ESCRealM takes 1 to 4, "
                f"use_dysample: true any."
            )
        dim = self.dim
        # In the published order of parameters, by which optimisers' states go
        self.proj = Conv3x3(3, dim)
        self.blocks = self.new_blocks()
        self.last = Conv3x3(dim, dim)
        if self.use_dysample:
            self.to_img = DySample(dim, scale=self.upscaling_factor)
        else:
            doubling: list[nn.Module] = []
            for _ in range(2):
                doubling += [nn.Upsample(scale_factor=2), Conv3x3(dim, dim), nn.LeakyReLU(0.2)]
            self.to_img = nn.Sequential(*doubling, Conv3x3(dim, dim), nn.LeakyReLU(0.2), Conv3x3(dim, 3))
        self.skip = nn.Sequential(*_image_skip(3, dim))

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        """Its enlargement comes first: the first weights are `to_img.1`, or those of a DySample."""
        if "to_img.1.weight" not in shapes and "to_img.offset.weight" not in shapes:
            return None
        use_dysample = "to_img.offset.weight" in shapes
        scale = 4
        if use_dysample:
            what = f"two coordinates, for {DySample.GROUPS} groups, of a square of sub-pixels"
            scale = shapes.root("to_img.offset.weight", 0, what, times=2 * DySample.GROUPS)
        return shapes.options(scale=scale, use_dysample=use_dysample)


@dataclass(eq=False, repr=False)
class ESCRealM(_RealNetwork):
    """ESC-Real for scales 1 to 4, with a choice of upsamplers.

    Shapes: (B, 3, H, W) -> (B, 3, H * s, W * s), s = upscaling_factor. Guarantees and errors as of `ESC`; to export it
    with dynamic sizes and `unshuffle_mod`, make them multiples of 4 / s, from 8 / s on.

    Args:
        upscaling_factor: 1, 2, 3 or 4.
        upsampler: pixelshuffledirect, pixelshuffle, nearest+conv, dysample or transpose+conv, see
            `UniversalUpsampler`. At scale 1 without unshuffle_mod it is one convolution (conv), whatever is given.
        mid_dim: channels inside the upsamplers pixelshuffle and dysample.
        unshuffle_mod: for scales below 3, work on the image unshuffled to a quarter or half of its size (padded by
            reflection to a multiple) and enlarge by 4.
        others: see `ESC`.
    """

    TAIL_SCALE = 4
    published_defaults: ClassVar[dict[str, Any]] = {"upsampler": "nearest+conv"}

    _: KW_ONLY
    upsampler: str = "pixelshuffledirect"
    mid_dim: int = 48
    unshuffle_mod: bool = True
    to_img: UniversalUpsampler = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        scale, dim = self.upscaling_factor, self.dim
        if scale not in (1, 2, 3, 4):
            raise ValueError(f"upscaling_factor is {scale}; ESCRealM takes 1, 2, 3 or 4.")
        if self.upsampler not in UPSAMPLERS:
            raise ValueError(f"upsampler {self.upsampler!r} is not known; allowed: {', '.join(UPSAMPLERS)}.")
        unshuffle: list[nn.Module] = []
        if self.unshuffle_mod and scale < 3:
            self.unshuffle_factor, scale = self.TAIL_SCALE // scale, self.TAIL_SCALE
            unshuffle.append(nn.PixelUnshuffle(self.unshuffle_factor))
        channels = 3 * self.unshuffle_factor**2
        proj = Conv3x3(channels, dim)
        self.proj = nn.Sequential(*unshuffle, proj) if unshuffle else proj
        self.skip = nn.Sequential(*unshuffle, *_image_skip(channels, dim))
        self.blocks = self.new_blocks()
        self.last = Conv3x3(dim, dim)
        name = "conv" if scale == 1 else self.upsampler
        self.to_img = UniversalUpsampler(name, scale=scale, dim=dim, mid=self.mid_dim)

    def adapt_state_dict(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> list[str]:
        """Give weights of a tail, in place, this network's description of it: theirs may be absent or be wrong."""
        if any(name.startswith(f"{prefix}to_img.") for name in state_dict):
            state_dict[f"{prefix}to_img.MetaUpsample"] = self.to_img.MetaUpsample
        return super().adapt_state_dict(state_dict, prefix)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (size * self.upscaling_factor for size in x.shape[-2:])
        if self.unshuffle_factor > 1:
            x = reflect_pad_to_multiple(x, self.unshuffle_factor)
        return super().forward(x)[:, :, :height, :width]

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        """Tails begin with weights, `to_img.0`, or have `to_img.2` (pa_up of traiNNer-redux); ESCReal's has neither."""
        if not any(name.startswith(("to_img.0.", "to_img.2.")) for name in shapes.weights):
            return None
        unshuffle = "proj.1.weight" in shapes
        upsampler, scale, mid_dim = _upsampler(shapes, (cls.TAIL_SCALE,) if unshuffle else (4, 3, 2, 1))
        if unshuffle:
            what = "3 colours times a square of 2 or 4 pixels"
            factor = shapes.root("proj.1.weight", 1, what, times=3)
            if factor not in (2, 4):
                raise shapes.error("proj.1.weight", f"which is not {what}")
            scale = cls.TAIL_SCALE // factor
        unshuffle_mod = unshuffle or (scale > 2 and bool(shapes.known.get("unshuffle_mod", True)))
        return shapes.options(scale=scale, upsampler=upsampler, mid_dim=mid_dim, unshuffle_mod=unshuffle_mod)


def _upsampler(shapes: Shapes, scales: tuple[int, ...]) -> tuple[str, int, int]:
    """The upsampler, its scale and mid_dim.

    Of several with the same names and shapes `known` decides, then the buffer MetaUpsample.
    """
    dim = shapes.size("blocks.0.attn.to_qkv.weight", 1)
    found = {name: each.shape for name, each in shapes.weights.items() if name.startswith("to_img.") and name != META}
    mid_dim = shapes.size("to_img.0.weight", 0) if "to_img.0.weight" in shapes else dim
    tails = []
    for scale, upsampler in product(scales, UPSAMPLERS):
        if (upsampler == "conv") == (scale == 1):
            with suppress(ValueError), torch.device("meta"):  # DySample with channels that it cannot divide
                tail = UniversalUpsampler(upsampler, scale=scale, dim=dim, mid=mid_dim).state_dict()
                if {f"to_img.{name}": each.shape for name, each in tail.items() if name != "MetaUpsample"} == found:
                    tails.append((upsampler, scale))
    if not tails:
        raise UserError(
            f"The weights are nearly those of an ESCRealM, but its tail ({some([*found])}) is none of "
            f"{', '.join(UPSAMPLERS)} for {dim} channels. Other upsamplers of traiNNer-redux, such as lda and pa_up, "
            "are not supported."
        )
    described, described_mid, buffer = None, None, shapes.weights.get(META)
    if buffer is not None and not buffer.is_meta and tuple(buffer.shape) == (7,) and 0 <= buffer[1] < len(UPSAMPLERS):
        _, number, scale, _, _, mid, _ = buffer.int().tolist()
        described, described_mid = (UPSAMPLERS[number], scale), mid if mid < 255 else None  # larger ones do not fit
    known_scale = scales[0] if len(scales) == 1 else shapes.known.get("upscaling_factor")
    fitting = [tail for tail in ((shapes.known.get("upsampler"), known_scale), described) if tail in tails]
    upsampler, scale = (fitting or tails)[0]
    if len(tails) > 1 and not fitting:
        others = " or ".join(f"{name} of x{of}" for name, of in tails[1:])
        shapes.assumptions.append(f"{upsampler} of x{scale} has the same shapes as {others}.")
    if upsampler not in ("pixelshuffle", "dysample"):  # which does not use it
        known_mid = shapes.known.get("mid_dim", described_mid)
        mid_dim = known_mid if isinstance(known_mid, int) and known_mid > 0 else ESCRealM.mid_dim
    return upsampler, scale, mid_dim
