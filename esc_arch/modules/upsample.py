"""Upsamplers: from features to the enlarged image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch.ops.padding import reflect_pad

from .conv3x3 import Conv3x3
from .precision import in_float32

__all__ = [
    "UPSAMPLERS",
    "DySample",
    "ReflectDepthwiseConv",
    "UniversalUpsampler",
    "pixel_shuffle_with_skip",
    "rescale_subpixel_conv",
]


def pixel_shuffle_with_skip(subpixels: Tensor, image: Tensor, scale: int) -> Tensor:
    """Pixel shuffle of the network's residual, added to the image enlarged by repeating its pixels.

    Args:
        subpixels: (B, 3 * scale^2, H, W).
        image: (B, 3, H, W), the network's input.

    Returns:
        (B, 3, H * scale, W * scale).
    """
    # Contiguous NCHW, whatever the layout of the features
    return F.pixel_shuffle(subpixels.contiguous() + image.contiguous().repeat_interleave(scale**2, dim=1), scale)


def rescale_subpixel_conv(tensor: Tensor, channels: int) -> tuple[Tensor, int]:
    """The weight or bias of a convolution before a pixel shuffle, made for another scale.

    Its output channels are `colours` grids of (s, s) sub-pixels; the grid is interpolated bilinearly
    (align_corners false) to (t, t). This is how networks for x3 and x4 start from x2.

    Args:
        tensor: (3 * s^2, ...), weight or bias.
        channels: 3 * t^2, the output channels wanted.

    Returns:
        (3 * t^2, ...), and s.

    Raises:
        ValueError: a number of channels is not 3 times a square, or there are no numbers.
    """
    colours = 3
    source, target = (math.isqrt(n // colours) for n in (tensor.shape[0], channels))
    for n, side in ((tensor.shape[0], source), (channels, target)):
        if colours * side**2 != n or not tensor.numel():
            raise ValueError(f"{n} channels are not {colours} colours times a square of sub-pixels.")
    grid = tensor.reshape(colours, source, source, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(channels, *tensor.shape[1:]), source


class ReflectDepthwiseConv(nn.Conv2d):
    """A depth-wise convolution of odd `kernel_size` with reflection padding, for maps of any size.

    Shapes: (B, dim, H, W) -> (B, dim, H, W). Convolutions of PyTorch refuse maps smaller than their padding.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.margin = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(reflect_pad(x, self.margin, self.margin, self.margin, self.margin))


class DySample(nn.Module):
    """Upsampling by resampling at learned places (Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023).

    Every output pixel is read bilinearly from the map, at its own place plus an offset that the map determines; the
    channels are divided into groups with offsets of their own. A 1 x 1 convolution ends it.

    Shapes: (B, dim, H, W) -> (B, out_dim, H * scale, W * scale).

    Args:
        dim: channels; a multiple of 4.
        out_dim: channels of the result.
        scale: a whole number of at least 1.
    """

    #: Of channels, as in all published networks.
    GROUPS = 4

    init_pos: Tensor

    def __init__(self, dim: int, out_dim: int = 3, scale: int = 4) -> None:
        super().__init__()
        groups = self.GROUPS
        if dim % groups:
            raise ValueError(f"DySample divides the channels into {groups} groups; {dim} is not a multiple of it.")
        self.scale = scale
        offsets = 2 * groups * scale**2
        self.offset = nn.Conv2d(dim, offsets, 1)
        self.scope = nn.Conv2d(dim, offsets, 1, bias=False)
        self.end_conv = nn.Conv2d(dim, out_dim, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.scope.weight)
        # Where sub-pixels lie from the centre of their pixel, in pixels: x, then y, for each group
        steps = (torch.arange(scale) - (scale - 1) / 2) / scale
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        places = torch.stack([x.flatten(), y.flatten()])[:, None].repeat(1, groups, 1)
        self.register_buffer("init_pos", places.reshape(1, -1, 1, 1))

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        return self.sample(x, *self.places(x, (0, 0), (x.shape[-2], x.shape[-1])))

    @in_float32
    def places(self, x: Tensor, first: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where output pixels are read from a map: columns and rows, -1 .. 1.

        Args:
            x: a part of the map, (B, dim, h, w).
            first: its first row and column.
            size: height and width of the map.

        Returns:
            (B, groups, h * scale, w * scale), twice.
        """
        batch, _, height, width = x.shape
        offset = self.offset(x) * self.scope(x).sigmoid() * 0.5 + self.init_pos
        # The channels are x or y, then group, then sub-pixel: a shuffle puts the last one in its place
        offset = F.pixel_shuffle(offset, self.scale).reshape(
            batch, 2, self.GROUPS, height * self.scale, width * self.scale
        )
        # The centre of the input pixel that each output pixel along a side lies in
        rows, columns = (
            (torch.arange(start, start + length, device=x.device, dtype=x.dtype) + 0.5).repeat_interleave(self.scale)
            for start, length in zip(first, (height, width), strict=True)
        )
        return (columns + offset[:, 0]) * (2 / size[1]) - 1, (rows[:, None] + offset[:, 1]) * (2 / size[0]) - 1

    @in_float32
    def sample(self, x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        """The map at such places: (B, out_dim, h * scale, w * scale)."""
        batch, channels, height, width = x.shape
        sampled = F.grid_sample(
            x.reshape(batch * self.GROUPS, channels // self.GROUPS, height, width),
            torch.stack([columns, rows], dim=-1).flatten(0, 1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        sampled = sampled.reshape(batch, channels, rows.shape[-2], rows.shape[-1])
        return self.end_conv(sampled.to(self.end_conv.weight.dtype))


#: In the order of their numbers in `MetaUpsample`.
UPSAMPLERS = ("conv", "pixelshuffledirect", "pixelshuffle", "nearest+conv", "dysample", "transpose+conv")
#: The enlargements, one after the other, that make a scale: powers of 2, or 3 at once.
STEPS = {2: [2], 3: [3], 4: [2, 2]}


def _upsampler(name: str, scale: int, dim: int, mid: int) -> list[nn.Module]:
    """The layers of one of `UPSAMPLERS`, for scales 1 (conv alone) to 4."""
    if name == "conv":
        if scale != 1:
            raise ValueError(
                f"upsampler conv does not enlarge, but the scale here is {scale}: choose another upsampler."
            )
        return [Conv3x3(dim, 3)]
    if name == "pixelshuffledirect":
        return [Conv3x3(dim, 3 * scale**2), nn.PixelShuffle(scale)]
    if name == "dysample":
        narrowing: list[nn.Module] = [] if mid == dim else [Conv3x3(dim, mid), nn.LeakyReLU()]
        return [*narrowing, DySample(mid, scale=scale)]
    layers: list[nn.Module] = []
    if name == "pixelshuffle":
        layers += [Conv3x3(dim, mid), nn.LeakyReLU()]
        for step in STEPS[scale]:
            layers += [Conv3x3(mid, mid * step**2), nn.PixelShuffle(step)]
        return [*layers, Conv3x3(mid, 3)]
    if name == "nearest+conv":
        for step in STEPS[scale]:
            layers += [Conv3x3(dim, dim), nn.Upsample(scale_factor=step), nn.LeakyReLU(0.2)]
        return [*layers, Conv3x3(dim, dim), nn.LeakyReLU(0.2), Conv3x3(dim, 3)]
    if scale == 4:
        layers += [nn.ConvTranspose2d(dim, dim, 4, 2, 1), nn.GELU()]
    last = nn.ConvTranspose2d(dim, 3, 3, stride=3) if scale == 3 else nn.ConvTranspose2d(dim, 3, 4, 2, 1)
    return [*layers, last, Conv3x3(3, 3)]


class UniversalUpsampler(nn.Sequential):
    """The tail of ESCRealM: one of `UPSAMPLERS`.

    Shapes: (B, dim, H, W) -> (B, 3, H * scale, W * scale). `mid` are the channels in between, of pixelshuffle and
    dysample. ValueError for conv with a scale above 1.

    Checkpoints say which one they have in the buffer `MetaUpsample`, 7 numbers of uint8: 2 (3 for transpose+conv, which
    came with that version), the upsampler's number, scale, dim, 3, mid, groups of dysample. One that says otherwise or
    nothing is accepted: the weights decide whether it fits.
    """

    MetaUpsample: Tensor

    def __init__(self, name: str, *, scale: int, dim: int, mid: int) -> None:
        super().__init__(*_upsampler(name, scale, dim, mid))
        version = 3 if name == "transpose+conv" else 2
        numbers = [version, UPSAMPLERS.index(name), scale, dim, 3, mid, DySample.GROUPS]
        # uint8 is the published type; widths above 255 are cut to it, as nothing is read from here
        self.register_buffer("MetaUpsample", torch.tensor([min(n, 255) for n in numbers], dtype=torch.uint8))
