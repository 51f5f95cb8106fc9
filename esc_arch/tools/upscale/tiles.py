"""Fast tiling: an image in overlapping tiles, each through the whole network. Approximate.

Tiles begin at multiples of the attention's window, so that windows are those of the whole image; they are blended
where they overlap. What is left to decide is where the means come from that ConvAttn makes its kernels from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.archs.base import ESCFamily
from esc_arch.archs.esc_lte_arch import ESCLTE
from esc_arch.errors import UserError
from esc_arch.modules import fused
from esc_arch.modules.fused import conv3x3
from esc_arch.ops.resize import matlab_resize

from .network import Upscaler
from .regions import Picture, Region
from .tails import blocks_of, colours, folding_of, positions

__all__ = ["POOLS", "enlarge_in_tiles"]

#: Where ConvAttn's means come from: see `enlarge_in_tiles`.
POOLS = ("image", "reduced", "tile")
#: The image reduced for its means has at most so many pixels.
REDUCED_PIXELS = 256**2

#: Gives a pair's means (1, pdim) of a map (1, dim, h, w), by the numbers of block and pair; None for the map's own.
Means = Callable[[int, int, Tensor], Tensor | None]


@torch.no_grad()
def enlarge_in_tiles(
    upscaler: Upscaler,
    image: npt.NDArray[Any],
    write: Callable[[int, int, Tensor], None],
    *,
    tile: int,
    overlap: int | None = None,
    pools: str = "image",
    scale: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Enlarge an image in overlapping tiles. The memory is that of a tile, and of a row of tiles of the result.

    Args:
        image, write, scale, progress: see `large_images.enlarge_exactly`.
        tile: their side in pixels of the image; rounded up to whole windows.
        overlap: pixels that neighbours have in common, over which one fades into the other; rounded up to whole
            windows, and less than a tile. None for one window.
        pools: where the means over the whole image come from. `image`: from all tiles, in a run before, which takes
            as long again; `reduced`: from the image made small, which takes little; `tile`: each tile's own, which
            shows as changes of colour and sharpness from tile to tile.

    Raises:
        UserError: a value that cannot be; a scale that the network has not; an array that is no picture.
    """
    if pools not in POOLS:
        raise UserError(f"pools: {pools!r} given; must be one of {', '.join(POOLS)}.")
    tiling = _tiling(upscaler, image, tile, overlap, scale)
    run = _Run(upscaler, tiling, progress, runs=2 if pools == "image" else 1)
    means: Means = _own
    if pools != "tile":
        means = _given(_reduced_means(upscaler, tiling.picture))
    if pools == "image":
        means = _given(run.gather_means(means))
    run.write_blocks(means, write)


@dataclass(frozen=True)
class Axis:
    """One side of the image.

    Attributes:
        tiles: first and last + 1 pixel of the features of every tile.
        pixels: the same of the result.
        weights: what each tile counts for at its pixels of the result; of all tiles together 1.
        positions: of the pixels of the result on the features.
        pixel: the length of one there.
    """

    tiles: list[tuple[int, int]]
    pixels: list[tuple[int, int]]
    weights: list[Tensor]
    positions: Tensor
    pixel: float


@dataclass(frozen=True)
class Tiling:
    picture: Picture
    rows: Axis
    columns: Axis

    def regions(self) -> Iterator[tuple[int, int, Region]]:
        """Numbers of row and column, and the features, of every tile."""
        for i, (top, bottom) in enumerate(self.rows.tiles):
            for j, (left, right) in enumerate(self.columns.tiles):
                yield i, j, Region(top, left, bottom, right)


def _tiling(upscaler: Upscaler, image: npt.NDArray[Any], tile: int, overlap: int | None, scale: float | None) -> Tiling:
    window, folding = upscaler.net.window_size, folding_of(upscaler.net)
    picture = Picture(image, upscaler.window, folding)
    size = upscaler.output_size(picture.image.shape[0], picture.image.shape[1], scale)
    unit = window * folding
    if tile < 1:
        raise UserError(f"tile: {tile} given; must be at least 1, and is rounded up to multiples of {unit} here.")
    whole_tile = -(-tile // unit) * window
    common = window if overlap is None else -(-max(overlap, 0) // unit) * window
    if overlap is None and whole_tile == window:
        common = 0
    if common >= whole_tile:
        raise UserError(
            f"overlap: {overlap} given, which is {common * folding} in whole windows; must be less than the tile, "
            f"which is {whole_tile * folding}."
        )
    axes = [
        _axis(length // folding, pixels, length_shown / length, whole_tile, common, window)
        for length, pixels, length_shown in zip((picture.height, picture.width), size, image.shape[:2], strict=True)
    ]
    return Tiling(picture, *axes)


def _axis(length: int, pixels: int, shown: float, tile: int, overlap: int, window: int) -> Axis:
    tiles = _spans(length, tile, overlap, window)
    places, pixel = positions(0, pixels, pixels, length, shown)
    centres = places.double() + 0.5
    raw = torch.zeros(len(tiles), pixels, dtype=torch.float64)
    for number, (first, last) in enumerate(tiles):
        # Up over what it shares with the tile before, down over what it shares with the next
        before = tiles[number - 1][1] - first if number else 0
        after = last - tiles[number + 1][0] if number + 1 < len(tiles) else 0
        up = (centres - first) / before if before > 0 else (centres >= first).double()
        down = (last - centres) / after if after > 0 else (centres < last).double()
        raw[number] = torch.minimum(up, down).clamp(0, 1)
    raw[-1, centres >= length] = 1  # centres in the last half pixel may be rounded beyond the end
    raw /= raw.sum(0)
    spans = [(int(row.nonzero()[0]), int(row.nonzero()[-1]) + 1) if row.any() else (0, 0) for row in raw]
    weights = [row[first:last].float() for row, (first, last) in zip(raw, spans, strict=True)]
    return Axis(tiles, spans, weights, places, pixel)


def _spans(length: int, tile: int, overlap: int, window: int) -> list[tuple[int, int]]:
    """Tiles along a side of the features, all as long, at multiples of `window`; the last one has what remains."""
    if length <= tile:
        return [(0, length)]
    last = (length - tile) // window * window
    starts = [*range(0, last, tile - overlap), last]
    return [(first, first + tile) for first in starts[:-1]] + [(last, length)]


def _own(block: int, pair: int, x: Tensor) -> None:
    return None


def _given(means: dict[tuple[int, int], Tensor]) -> Means:
    return lambda block, pair, x: means[block, pair]


class _Gathering:
    """Means of maps over several tiles, as they come by."""

    def __init__(self, source: Means = _own) -> None:
        self.source = source
        self.part: tuple[slice, slice] = (slice(None), slice(None))
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.pixels: dict[tuple[int, int], int] = {}

    def __call__(self, block: int, pair: int, x: Tensor) -> Tensor | None:
        key, counted = (block, pair), x[:, :, self.part[0], self.part[1]]
        self.sums[key] = self.sums.get(key, 0) + counted.sum((2, 3), dtype=torch.float64)
        self.pixels[key] = self.pixels.get(key, 0) + counted.shape[2] * counted.shape[3]
        return self.source(block, pair, x)

    def means(self) -> dict[tuple[int, int], Tensor]:
        return {key: (sums / self.pixels[key]).float() for key, sums in self.sums.items()}


def through_blocks(net: ESCFamily, x: Tensor, means: Means) -> Tensor:
    """`ESCFamily.run_blocks` with means from elsewhere."""
    kernels = net.large_kernels()
    for number, block in enumerate(blocks_of(net)):
        skip = x
        x = fused.attend(block, x)
        for pair in range(len(block.pconvs)):
            mixed, own = fused.mix(block, pair, x)
            given = means(number, pair, mixed[:, : fused.channels_pooled(block, pair)])
            x = fused.convolve(block, pair, x, mixed, own if given is None else given, *kernels)
        x = fused.finish(block, x, skip)
    return x


def _reduced_means(upscaler: Upscaler, picture: Picture) -> dict[tuple[int, int], Tensor]:
    """Means of the image made small."""
    net, folding = upscaler.net, folding_of(upscaler.net)
    reduced = _reduced(picture)
    height, width = (max(round(length / folding), 1) * folding for length in reduced.shape[-2:])
    x = matlab_resize(reduced, (height, width)).to(upscaler.device)
    gathering = _Gathering()
    with upscaler.computing():
        through_blocks(net, net.shallow_features(x), gathering)
    return gathering.means()


def _reduced(picture: Picture) -> Tensor:
    """The mean of every n x n pixels (1, 3, h, w), on the CPU, n such that there are not many."""
    n = max(1, int(np.ceil((picture.height * picture.width / REDUCED_PIXELS) ** 0.5)))
    n = min(n, picture.height, picture.width)
    strips = []
    for top in range(0, picture.height - n + 1, n):
        strip = picture.read(Region(top, 0, top + n, picture.width // n * n), torch.device("cpu"))
        strips.append(torch.nn.functional.avg_pool2d(strip, n))
    return torch.cat(strips, dim=2)


class _Run:
    def __init__(self, upscaler: Upscaler, tiling: Tiling, progress: Callable[[float], None] | None, runs: int) -> None:
        self.upscaler, self.net, self.tiling, self.progress = upscaler, upscaler.net, tiling, progress
        self.folding = folding_of(self.net)
        self.done = 0
        self.total = runs * len(tiling.rows.tiles) * len(tiling.columns.tiles)

    def gather_means(self, source: Means) -> dict[tuple[int, int], Tensor]:
        """Of all tiles, each pixel counted once; computed with kernels of other means."""
        gathering = _Gathering(source)
        rows, columns = (_borders(axis.tiles) for axis in (self.tiling.rows, self.tiling.columns))
        for i, j, region in self.tiling.regions():
            gathering.part = (
                slice(rows[i] - region.top, rows[i + 1] - region.top),
                slice(columns[j] - region.left, columns[j + 1] - region.left),
            )
            with self.upscaler.computing():
                through_blocks(self.net, self.net.shallow_features(self._image(region)), gathering)
            self._tell()
        return gathering.means()

    def write_blocks(self, means: Means, write: Callable[[int, int, Tensor], None]) -> None:
        """Blend the tiles a row of them after the other; what no later one reaches is written."""
        rows, columns = self.tiling.rows, self.tiling.columns
        width = len(columns.positions)
        written = 0
        strip = torch.zeros(3, 0, width)
        for i, j, region in self.tiling.regions():
            (top, bottom), (left, right) = rows.pixels[i], columns.pixels[j]
            if j == 0:
                strip = torch.cat([strip, torch.zeros(3, max(bottom - written - strip.shape[1], 0), width)], dim=1)
            if bottom > top and right > left:
                enlarged = self._enlarged(region, Region(top, left, bottom, right), means).cpu()
                weights = rows.weights[i][:, None] * columns.weights[j]
                strip[:, top - written : bottom - written, left:right] += weights * enlarged
            self._tell()
            if j == len(columns.tiles) - 1:
                later = [first for first, last in rows.pixels[i + 1 :] if last > first]
                ready = min(later, default=len(rows.positions)) - written
                if ready:
                    write(written, 0, strip[:, :ready].clone())
                    strip, written = strip[:, ready:].clone(), written + ready

    def _image(self, region: Region) -> Tensor:
        return self.tiling.picture.read(region.times(self.folding), self.upscaler.device)

    def _enlarged(self, region: Region, out: Region, means: Means) -> Tensor:
        """What a tile makes of pixels of the result: (3, h, w), float32."""
        net, image = self.net, self._image(region)
        rows, columns = self.tiling.rows, self.tiling.columns
        with self.upscaler.computing():
            shallow = net.shallow_features(image)
            feat = through_blocks(net, shallow, means)
            if not isinstance(net, ESCLTE):
                enlarged = net.reconstruct(feat, shallow, image).float()
                return out.of(region.times(enlarged.shape[-1] // region.width), enlarged)[0]
            feat = conv3x3(net.last, feat, residual=shallow)
        pixel = (rows.pixel, columns.pixel)
        down, across = rows.positions[out.top : out.bottom], columns.positions[out.left : out.right]
        return colours(net, feat, image, region, down, across, pixel)

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done / self.total)


def _borders(tiles: list[tuple[int, int]]) -> list[int]:
    """In the middle of what neighbours have in common; the ends of the side before and behind them."""
    between = [(first[1] + second[0]) // 2 for first, second in pairwise(tiles)]
    return [tiles[0][0], *between, tiles[-1][1]]
