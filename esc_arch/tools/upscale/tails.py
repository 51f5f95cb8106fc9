"""The ends of the networks, from stored features to a block of the enlarged image.

A block comes out as it is in the whole image: its features are read with as much around them as it depends on, and
what is computed from coordinates (ESC-FP's bicubic enlargement, DySample, LTE) is computed from those of the whole
image, with the rounding that they have there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch.archs.base import ESCFamily
from esc_arch.archs.esc_arch import ESC
from esc_arch.archs.esc_fp_arch import ESCFP
from esc_arch.archs.esc_lte_arch import ESCLTE
from esc_arch.archs.esc_real_arch import ESCReal, ESCRealM
from esc_arch.archs.esc_rib_arch import ESCRIB
from esc_arch.modules import ESCBlock
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.upsample import DySample

from .feature_maps import FeatureMap
from .network import Upscaler
from .regions import Picture, Region

if TYPE_CHECKING:
    from .large_images import TiledExecutor

__all__ = ["Tail", "blocks_of", "colours", "folding_of", "positions", "tail_for"]


def folding_of(net: ESCFamily) -> int:
    """How many pixels of the image along each side are one of the features."""
    return net.folding if isinstance(net, ESCRealM) else 1


def blocks_of(net: ESCFamily) -> list[ESCBlock]:
    """The network's blocks, by their type."""
    return [cast(ESCBlock, block) for block in net.blocks]


class Tail(ABC):
    """What makes blocks of the enlarged image.

    Args:
        upscaler, picture: what is enlarged by what.
        size: (H', W') of the result.
    """

    #: TiledExecutor over the features that `prepare` makes.
    passes = 0

    def __init__(self, upscaler: Upscaler, picture: Picture, size: tuple[int, int]) -> None:
        self.upscaler, self.picture, self.size = upscaler, picture, size
        self.net = upscaler.net
        self.folding = folding_of(self.net)
        self.height, self.width = picture.height // self.folding, picture.width // self.folding
        #: Pixels of the result for one of the features.
        self.enlargement = size[0] * self.folding / picture.image.shape[0]

    #: Blocks begin at multiples of so many pixels.
    align: int
    #: How much around the features of a block is read.
    margin: int

    def prepare(self, passes: TiledExecutor, features: FeatureMap) -> FeatureMap:
        """From the features behind the blocks to those that `block` starts from."""
        return features

    @abstractmethod
    def block(self, out: Region, features: FeatureMap) -> Tensor:
        """A region of the enlarged image, (3, h, w), float32."""

    def read(self, region: Region, features: FeatureMap) -> tuple[Tensor, Tensor]:
        """Features, and the image there."""
        device = self.upscaler.device
        return features.read(region, device), self.picture.read(region.times(self.folding), device)


class ConvTail(Tail):
    """Convolutions and pixel shuffles, which see a fixed neighbourhood: `reconstruct` of features with a margin."""

    def __init__(
        self, upscaler: Upscaler, picture: Picture, size: tuple[int, int], layers: Sequence[nn.Module]
    ) -> None:
        super().__init__(upscaler, picture, size)
        self.align = int(upscaler.scale) * self.folding
        self.margin = _reach(layers)

    def block(self, out: Region, features: FeatureMap) -> Tensor:
        core = _shrunk(out, self.align)
        region = core.grown(self.margin, self.height, self.width)
        feat, image = self.read(region, features)
        with self.upscaler.computing():
            enlarged = self.enlarge(feat, image, region)
        return out.of(region.times(self.align), enlarged)[0].float().contiguous()

    def enlarge(self, feat: Tensor, image: Tensor, region: Region) -> Tensor:
        return self.net.reconstruct(feat, self.net.shallow_features(image), image)


class BicubicTail(ConvTail):
    """ESC-FP's: the image that is added is enlarged here, as PyTorch places its pixels in the whole image."""

    def enlarge(self, feat: Tensor, image: Tensor, region: Region) -> Tensor:
        residual = self.net.reconstruct(feat, self.net.shallow_features(image), torch.zeros_like(image))
        # Bicubic interpolation sees two pixels to each side, which the margin has; what is beyond is cropped
        rows = _bicubic(region.top, region.bottom, self.height, self.align).to(image)
        columns = _bicubic(region.left, region.right, self.width, self.align).to(image)
        with torch.autocast(image.device.type, enabled=False):
            return residual + rows @ image @ columns.T


class DySampleTail(Tail):
    """Resampling at places that the features determine: those are computed first, then what is there is read."""

    passes = 1
    #: More pixels of the features than this, and more than a few times those of the block, are not read at a time.
    LEAST_READ = 64**2

    def __init__(
        self,
        upscaler: Upscaler,
        picture: Picture,
        size: tuple[int, int],
        net: ESCReal | ESCRealM,
        narrowing: Sequence[nn.Module],
        sampler: DySample,
    ) -> None:
        super().__init__(upscaler, picture, size)
        self.real, self.narrowing, self.sampler = net, nn.Sequential(*narrowing), sampler
        self.align = sampler.scale
        self.margin = _reach(narrowing) + max(_reach([net.last]), _reach([net.skip]))

    def prepare(self, passes: TiledExecutor, features: FeatureMap) -> FeatureMap:
        mid = self.sampler.end_conv.in_channels
        sampled = passes.new_map(mid)

        def compute(core: Region) -> None:
            region = core.grown(self.margin, self.height, self.width)
            feat, image = self.read(region, features)
            feat = conv3x3(self.real.last, feat, residual=self.net.shallow_features(image)) + self.real.skip(image)
            sampled.write(core, core.of(region, self.narrowing(feat)))

        passes.each(compute)
        return sampled

    def block(self, out: Region, features: FeatureMap) -> Tensor:
        core = _shrunk(out, self.align)
        x = features.read(core, self.upscaler.device).float()
        across, down = self.places(x, core)
        seen = Region(*(int(edge) for edge in (down.min(), across.min(), down.max() + 2, across.max() + 2)))
        seen = seen.grown(0, self.height, self.width)
        halves = out.halves(self.align)
        if halves is not None and seen.area > max(4 * core.area, self.LEAST_READ):
            first, second = (self.block(half, features) for half in halves)
            return torch.cat([first, second], dim=1 if halves[0].width == out.width else 2)
        enlarged = self.sample(features.read(seen, self.upscaler.device), seen, across, down)
        return out.of(core.times(self.align), enlarged)[0].contiguous()

    def places(self, x: Tensor, core: Region) -> tuple[Tensor, Tensor]:
        """Where in the whole map each pixel is read, in pixels: columns and rows, (groups, h * scale, w * scale)."""
        sampler = self.sampler
        offset = sampler.offset(x) * sampler.scope(x).sigmoid() * 0.5 + sampler.init_pos
        offset = F.pixel_shuffle(offset, sampler.scale)[0].unflatten(0, (2, sampler.groups))
        rows = _centres(core.top, core.bottom, sampler.scale, x.device)[:, None]
        columns = _centres(core.left, core.right, sampler.scale, x.device)
        across, down = (
            _sampled_place((centres + offset[axis]) * (2 / size) - 1, size)
            for axis, (centres, size) in enumerate([(columns, self.width), (rows, self.height)])
        )
        return across, down

    def sample(self, x: Tensor, seen: Region, across: Tensor, down: Tensor) -> Tensor:
        """Read x, which shows `seen`, at places in the whole map, each group of channels at its own."""
        groups = self.sampler.groups
        # In float64 the places stay what they are while they become those of this part
        grid = torch.stack(
            [
                (across.double() - seen.left + 0.5) * (2 / seen.width) - 1,
                (down.double() - seen.top + 0.5) * (2 / seen.height) - 1,
            ],
            dim=-1,
        )
        parts = x[0].double().unflatten(0, (groups, -1))
        sampled = F.grid_sample(parts, grid, mode="bilinear", padding_mode="border", align_corners=False)
        out: Tensor = self.sampler.end_conv(sampled.flatten(0, 1)[None].float())
        return out


class LTETail(Tail):
    """Colours at points: of any scale, so that blocks begin at any pixel."""

    align = 1

    def __init__(self, upscaler: Upscaler, picture: Picture, size: tuple[int, int], net: ESCLTE) -> None:
        super().__init__(upscaler, picture, size)
        self.lte_net = net
        # Of a point the pixels to both sides are asked, which see their neighbours
        self.margin = _reach([net.last, net.lte.coef]) + 1

    def block(self, out: Region, features: FeatureMap) -> Tensor:
        shown = self.picture.image.shape[0] / self.height, self.picture.image.shape[1] / self.width
        rows, height = positions(out.top, out.bottom, self.size[0], self.height, shown[0])
        columns, width = positions(out.left, out.right, self.size[1], self.width, shown[1])
        ends = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        region = Region(*(math.floor(edge) for edge in ends)).grown(self.margin, self.height, self.width)
        feat, image = self.read(region, features)
        with self.upscaler.computing():
            feat = conv3x3(self.lte_net.last, feat, residual=self.net.shallow_features(image))
        return colours(self.lte_net, feat, image, region, rows, columns, (height, width))


def colours(
    net: ESCLTE,
    feat: Tensor,
    image: Tensor,
    region: Region,
    rows: Tensor,
    columns: Tensor,
    pixel: tuple[float, float],
) -> Tensor:
    """What LTE makes of a part of the features.

    Args:
        feat, image: (1, dim, h, w) and (1, 3, h, w), which show `region` of the whole map.
        rows, columns: positions of pixels of the result in the whole map, in its pixels; see `positions`.
        pixel: height and width of a pixel of the result, in pixels of the map.

    Returns:
        (3, number of rows, number of columns), float32.
    """
    # In float64 the positions stay what they are while they become those of this part
    axes = [
        (positions.double() - first + 0.5) * (2 / length) - 1
        for positions, first, length in ((rows, region.top, region.height), (columns, region.left, region.width))
    ]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)[None].to(feat.device)
    cell = torch.tensor([[2 * pixel[0] / region.height, 2 * pixel[1] / region.width]], dtype=torch.float64)
    chunk = min(net.query_chunk or LTE_CHUNK, LTE_CHUNK)
    points = net.lte(feat.float(), image, coords, cell.to(feat.device), chunk=chunk)
    return points[0].unflatten(-1, (len(rows), len(columns)))


#: Points at a time: each takes some tens of kilobytes.
LTE_CHUNK = 4096


def positions(first: int, last: int, count: int, length: int, shown: float) -> tuple[Tensor, float]:
    """Where pixels of the result lie on a side of the map, as `LTE` finds them in the whole image.

    Args:
        first, last: the pixels wanted of `count`.
        length: of the map's side.
        shown: the part of it that the result shows.

    Returns:
        The positions of their centres in pixels, 0 being that of the map's first, float32; and a pixel's length.
    """
    cell = 2 * shown / count
    coords = (torch.arange(first, last, dtype=torch.float32) + 0.5) * cell - 1
    size = torch.tensor(cell) * length / 2  # float32, as there
    return (coords + 1) * (length / 2) - 0.5, size.item()


def tail_for(upscaler: Upscaler, picture: Picture, size: tuple[int, int]) -> Tail:
    """The tail of a network.

    Raises:
        TypeError: the network is none that is known here.
    """
    net, common = upscaler.net, (upscaler, picture, size)
    if isinstance(net, ESCLTE):
        return LTETail(*common, net)
    if isinstance(net, ESCFP):
        return BicubicTail(*common, [net.last, net.to_img])
    if isinstance(net, ESC):
        return ConvTail(*common, [net.last, net.to_img])
    if isinstance(net, ESCRIB):
        return ConvTail(*common, [net.last, net.upsampler])
    if isinstance(net, ESCReal | ESCRealM):
        layers = list(net.to_img) if isinstance(net.to_img, nn.Sequential) else [net.to_img]
        if isinstance(layers[-1], DySample):
            return DySampleTail(*common, net, layers[:-1], layers[-1])
        # The image's way around the blocks has the larger kernel, beside that of `last`
        return ConvTail(*common, [net.skip, net.to_img])
    raise TypeError(f"{type(net).__name__} is not known to large images.")


def _reach(layers: Iterable[nn.Module]) -> int:
    """How many pixels of its input to each side a result depends on, of layers one after the other."""
    pixels = 0
    leaves = [leaf for layer in layers for leaf in layer.modules() if not list(leaf.children())]
    for leaf in reversed(leaves):
        if isinstance(leaf, nn.Conv2d):
            pixels += leaf.kernel_size[0] // 2
        elif isinstance(leaf, nn.ConvTranspose2d):
            # Pixel i of the input is added to the pixels i * stride - padding + (0 .. kernel_size - 1) of the result
            size, stride, padding = leaf.kernel_size[0], leaf.stride[0], int(leaf.padding[0])
            pixels = max((pixels + size - 1 - padding) // stride, math.ceil((pixels + padding) / stride))
        elif isinstance(leaf, nn.Upsample | nn.PixelShuffle):
            factor = leaf.scale_factor if isinstance(leaf, nn.Upsample) else leaf.upscale_factor
            pixels = math.ceil(pixels / float(factor))  # type: ignore[arg-type]  # one number in all of them
    return pixels


def _shrunk(out: Region, factor: int) -> Region:
    """The features that a region of the result, which begins at a multiple of `factor`, is made of."""
    return Region(out.top // factor, out.left // factor, -(-out.bottom // factor), -(-out.right // factor))


def _centres(first: int, last: int, scale: int, device: torch.device) -> Tensor:
    """The centres of pixels first .. last - 1, each `scale` times."""
    return (torch.arange(first, last, device=device, dtype=torch.float32) + 0.5).repeat_interleave(scale)


def _sampled_place(coords: Tensor, size: int) -> Tensor:
    """Where grid_sample reads a map with `size` pixels a side that spans -1 .. 1, in pixels, never beyond its end.

    It is computed from coords + 1 in float32 with one rounding: in wide maps that is off by up to 0.001 pixels.
    """
    return ((coords + 1).double() * (size / 2) - 0.5).float().clamp(0, size - 1)


def _bicubic(first: int, last: int, length: int, scale: int) -> Tensor:
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
