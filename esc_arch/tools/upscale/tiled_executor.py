"""A network a step at a time, each step over the whole image in tiles; see `large_images`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError
from esc_arch.modules import ESCBlock, fused
from esc_arch.ops.window_attention import window_attention

from .feature_maps import FeatureMap
from .memory import is_out_of_memory, release, trim_heap
from .network import Upscaler

__all__ = ["MAPS", "PaddedImage", "Plan", "TiledExecutor", "cuts", "grid", "large_kernel_reach"]

#: The largest value of each type that images may have.
PEAKS = {np.dtype("uint8"): 255, np.dtype("uint16"): 65535, np.dtype("float32"): 1}
#: Maps that the blocks need: a block's input, and what a pair of layers reads and writes.
MAPS = 3


class Plan(NamedTuple):
    """How an image is computed in parts.

    Attributes:
        tile: side of the tiles, and of what blocks of the result are made of, in pixels of the features.
        in_files: True if feature maps are in temporary files.
    """

    tile: int
    in_files: bool = False


class TiledExecutor:
    """The steps of a network over a whole image, in tiles.

    Args:
        out_size: (H', W') of the result.
        plan: sizes of tiles, and where feature maps are.
        scratch, progress: see `large_images.enlarge`.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        image: PaddedImage,
        out_size: tuple[int, int],
        plan: Plan,
        scratch: Path | None = None,
        progress: Callable[[float], Any] | None = None,
    ) -> None:
        self.upscaler, self.image, self.plan = upscaler, image, plan
        self.device, self.net = upscaler.device, upscaler.net
        self.scratch, self.progress = scratch or Path(tempfile.gettempdir()), progress
        self.blocks = [cast(ESCBlock, block) for block in self.net.blocks]
        self.kernels = self.net.large_kernels()
        factor = self.net.unshuffle_factor
        self.size = image.height // factor, image.width // factor
        self.head = self.net.head((image.image.shape[0], image.image.shape[1]), self.size, out_size)
        self.done = 0
        #: A larger tile did not fit into the device's memory.
        self.largest_area = float("inf")

    @torch.no_grad()
    def run(self) -> Iterator[Tensor]:
        """Rows of the result from the top to the bottom, (3, h, W'), float32 on the CPU."""
        channels = self.net.shallow_features(self.read_image(Region(0, 0, 1, 1))).shape[1]
        with ExitStack() as stack:
            maps = [self.new_map(channels, stack) for _ in range(MAPS)]
            features, *others = maps
            self.each(lambda tile: features.write(tile, self._shallow(tile)))
            for block in self.blocks:
                self.run_block(block, *maps)
            for other in others:
                other.close()
            if self.head.prepares:
                pixel = Region(0, 0, 1, 1)
                channels = self.head.prepare(features.read(pixel), self.read_image(pixel)).shape[1]
                prepared = self.new_map(channels, stack)
                self.each(lambda tile: prepared.write(tile, self._prepare(features, tile)))
                features = prepared
            yield from self.rows(features)

    def read_image(self, region: Region) -> Tensor:
        """The image by a region of the features."""
        return self.image.read(region.times(self.net.unshuffle_factor), self.device)

    def new_map(self, channels: int, stack: ExitStack) -> FeatureMap:
        """A map of the features' size, which `stack` closes."""
        folder = self.scratch if self.plan.in_files else None
        made = FeatureMap(channels, self.size, self.upscaler.precision, self.device, folder)
        stack.callback(made.close)
        return made

    # --- tiles ------------------------------------------------------------------------------------------------------

    def each(self, compute: Callable[[Region], None]) -> None:
        """Call `compute` with every tile of the features; they begin at multiples of the attention's window."""
        done, window = 0, self.net.window_size
        for tile in grid(self.size, self.plan.tile, window):
            self.attempt(compute, tile, window)
            trim_heap()
            done += tile.area
            self._tell(done / (self.size[0] * self.size[1]))
        self.done += 1

    def attempt(self, compute: Callable[[Region], None], tile: Region, align: int) -> None:
        """Compute a tile, or its halves where the device has not enough memory for it: from then on for all."""
        halves = tile.halves(align)
        if tile.area <= self.largest_area or halves is None:
            try:
                with self.upscaler.computing():
                    compute(tile)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if halves is None:
                    raise UserError(
                        f"Memory ran out for a tile of {tile.width} x {tile.height} pixels of {self.device}, and it "
                        "cannot be smaller: free memory there, or use the CPU."
                    ) from error
            self.largest_area = tile.area / 2
            release(self.device)  # after the exception, whose frames hold tensors
        for half in halves:
            self.attempt(compute, half, align)

    def _tell(self, part: float) -> None:
        if self.progress is not None:
            count = 2 + self.head.prepares + sum(2 + len(block.pconvs) for block in self.blocks)
            self.progress((self.done + part) / count)

    # --- the network ------------------------------------------------------------------------------------------------

    def run_block(self, block: ESCBlock, skip: FeatureMap, x: FeatureMap, other: FeatureMap) -> None:
        """A block, whose result takes the place of its input `skip`: the last step needs that only where it writes."""
        self.each(lambda tile: x.write(tile, self._attend(block, skip, tile)))
        pairs = len(block.pconvs)
        sums: list[Tensor] = []

        def pool(tile: Region) -> None:
            region = tile.expand(1, self.size)
            sums.append(_channel_sums(block, 0, x.read(region), tile, region))

        if pairs:  # the sums for the other pairs are made where the pair before is computed
            self.each(pool)
        for pair in range(pairs):
            means = (torch.stack(sums).sum(0) / (self.size[0] * self.size[1])).float()
            sums = []
            last = pair == pairs - 1
            self.each(partial(self._convolve, block, pair, means, x, skip if last else other, sums))
            x, other = other, x
        if not pairs:
            self.each(partial(self._finish, block, x, skip))

    def rows(self, features: FeatureMap) -> Iterator[Tensor]:
        """The last pass: from features to blocks of the result, put together to whole rows."""
        self.largest_area = float("inf")
        height, width = self.head.out_size
        largest = round(self.plan.tile * self.head.enlargement)
        for top, bottom in cuts(height, largest, self.head.align):
            band, shown = torch.empty(3, bottom - top, width), Region(top, 0, bottom, width)

            def compute(out: Region, band: Tensor = band, shown: Region = shown) -> None:
                block = self.head.block(out, features.read, self.read_image)
                out.crop(band, shown).copy_(block)

            for left, right in cuts(width, largest, self.head.align):
                self.attempt(compute, Region(top, left, bottom, right), self.head.align)
                trim_heap()
                self._tell((top * width + right * (bottom - top)) / (height * width))
            yield band

    # What is computed of a tile, from as much around it as that depends on. All calls of a block's parts are here.

    def _shallow(self, tile: Region) -> Tensor:
        region = tile.expand(1, self.size)
        return tile.crop(self.net.shallow_features(self.read_image(region)), region)

    def _attend(self, block: ESCBlock, source: FeatureMap, tile: Region) -> Tensor:
        """The block's first ConvFFN and its attention, whose windows no tile cuts."""
        attn = block.attn
        region = tile.expand(1 if attn.gate is None else 2, self.size)
        x = fused.first_ffn(block, source.read(region))
        if attn.gate is None:
            return fused.window_attention(attn, block.ln_attn, _cropped(tile, region, x))
        normed = block.ln_attn(x)  # the gate sees neighbours of what attention sees
        qkv, bias = attn.to_qkv(_cropped(tile, region, normed)), attn.position_bias()
        attended = window_attention(qkv, bias, window=attn.window_size, heads=attn.num_heads, backend=attn.attn_type)
        return tile.crop(x, region) + attn.to_out(attended * tile.crop(attn.gate(normed), region).sigmoid())

    def _convolve(
        self,
        block: ESCBlock,
        pair: int,
        means: Tensor,
        source: FeatureMap,
        target: FeatureMap,
        sums: list[Tensor],
        tile: Region,
    ) -> None:
        """A pair, then, of its result, the sums for the next pair or the end of the block."""
        inner = tile.expand(1, self.size)
        region = inner.expand(1 + large_kernel_reach(block, pair), self.size)
        x = source.read(region)
        x = _cropped(inner, region, fused.convolve(block, pair, x, fused.mix(block, pair, x)[0], means, *self.kernels))
        if pair == len(block.pconvs) - 1:
            x = fused.finish(block, x, target.read(inner))
        else:
            sums.append(_channel_sums(block, pair + 1, x, tile, inner))
        target.write(tile, tile.crop(x, inner))

    def _finish(self, block: ESCBlock, source: FeatureMap, skip: FeatureMap, tile: Region) -> None:
        """The end of a block without pairs."""
        region = tile.expand(1, self.size)
        skip.write(tile, tile.crop(fused.finish(block, source.read(region), skip.read(region)), region))

    def _prepare(self, features: FeatureMap, tile: Region) -> Tensor:
        region = tile.expand(self.head.margin, self.size)
        return tile.crop(self.head.prepare(features.read(region), self.read_image(region)), region)


def large_kernel_reach(block: ESCBlock, pair: int) -> int:
    """How many pixels to each side the large kernel of a pair sees."""
    size: int = block.pconvs[pair].kernel_size  # type: ignore[assignment]  # all kinds have one
    return size // 2


def _cropped(inner: Region, outer: Region, x: Tensor) -> Tensor:
    return x if inner == outer else inner.crop(x, outer).contiguous(memory_format=torch.channels_last)


def _channel_sums(block: ESCBlock, pair: int, x: Tensor, tile: Region, region: Region) -> Tensor:
    """Sums (1, pdim) over a tile of what a pair's kernel is made from; x shows `region`."""
    mixed, _ = fused.mix(block, pair, x)
    return tile.crop(mixed[:, : fused.channels_pooled(block, pair)], region).sum((2, 3), dtype=torch.float64)


def cuts(length: int, largest: int, align: int = 1) -> list[tuple[int, int]]:
    """Cut 0 .. length into nearly equal parts, at multiples of `align`.

    A remainder of less than `align` at the end belongs to the last part and is not counted: attention reflects the map
    there, and what it reflects has to be in the same part.

    Args:
        largest: the longest part, at least `align`.
    """
    units = max(length // align, 1)
    count = -(-units // max(largest // align, 1))
    edges = [units * index // count * align for index in range(count)] + [length]
    return list(pairwise(edges))


def grid(size: tuple[int, int], largest: int, align: int = 1) -> list[Region]:
    """A map of this height and width cut both ways by `cuts`, row by row."""
    rows, columns = (cuts(length, largest, align) for length in size)
    return [Region(top, left, bottom, right) for top, bottom in rows for left, right in columns]


class PaddedImage:
    """An image as a network sees it, padded by reflection, read a region at a time and never padded as a whole.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1.
        multiples: what height and width are padded to multiples of, one after the other.

    Raises:
        UserError: the array is not such an image.
    """

    def __init__(self, image: npt.NDArray[Any], *multiples: int) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in PEAKS:
            raise UserError(
                f"The image is an array {tuple(image.shape)} of {image.dtype}; it must be (height, width, 3), RGB, of "
                f"{', '.join(map(str, PEAKS))}."
            )
        self.image = image
        self.rows, self.columns = (_padded(length, multiples) for length in image.shape[:2])
        self.height, self.width = len(self.rows), len(self.columns)

    def read(self, region: Region, device: torch.device) -> Tensor:
        """(1, 3, h, w), float32 in 0 .. 1."""
        rows, columns = self.rows[region.top : region.bottom], self.columns[region.left : region.right]
        pixels = self.image[np.ix_(rows, columns)].astype(np.float32) / np.float32(PEAKS[self.image.dtype])
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().to(device)


def _padded(length: int, multiples: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The pixel that each one of a padded side shows."""
    index = np.arange(length)
    for multiple in multiples:
        index = np.pad(index, (0, -len(index) % multiple), mode="reflect")  # to and fro, as the network's own padding
    return index
