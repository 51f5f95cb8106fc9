"""How large the tiles may be, and where feature maps are, within so much memory."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

from .feature_maps import FeatureMap
from .memory import available, format_memory, peak_of, resident
from .network import Upscaler
from .regions import PaddedImage, cuts
from .tiled_executor import MAPS, Plan, TiledExecutor, large_kernel_reach

__all__ = ["Cost", "Costs", "costs_of", "fits", "plan_for", "whole"]

#: Tiles of this side have margins of a few percent; larger ones gain nothing.
LARGEST_TILE = 512
#: Tiles are not made smaller than this to keep features in memory rather than in files.
LEAST_TILE_FOR_MEMORY = 192
#: Blocks of the result are not made of smaller tiles than this.
LEAST_HEAD_TILE = 8
#: What operators take for themselves, and what the allocator loses, beside the tensors that can be counted.
OVERHEAD = 1.3
#: Of the memory that is free, so much is used where nobody says how much.
SHARE = 0.7


class Cost(NamedTuple):
    """The bytes that a computation takes: for itself, and for each pixel of the features."""

    fixed: float
    per_pixel: float

    def of(self, pixels: int) -> float:
        return OVERHEAD * (self.fixed + self.per_pixel * pixels)


class Costs(NamedTuple):
    """Of a network: the whole at once, a tile of the features in its most expensive step, a block of the result."""

    whole: Cost
    tile: Cost
    block: Cost
    channels: int


_costs: weakref.WeakKeyDictionary[Upscaler, dict[float | None, Costs]] = weakref.WeakKeyDictionary()


def costs_of(upscaler: Upscaler, scale: float | None) -> Costs:
    """Measured once for each network and scale, on two small images."""
    of_network = _costs.setdefault(upscaler, {})
    if scale not in of_network:
        unit = upscaler.net.window_size * upscaler.net.unshuffle_factor
        # LTE computes so many points at a time, which both images should have
        least = 32 if not upscaler.any_scale else max(32, min(64, 128 / (scale or upscaler.scale)))
        side = math.ceil(least / unit) * unit
        small, large = (_Measured(upscaler, side * factor, scale) for factor in (1, 2))
        costs = []
        for first, second in zip(small.peaks, large.peaks, strict=True):
            per_pixel = max(0, second - first) / (large.pixels - small.pixels)
            costs.append(Cost(max(0.0, first - per_pixel * small.pixels), per_pixel))
        at_once, tile, block = costs
        of_network[scale] = Costs(at_once, tile, block, large.channels)
    return of_network[scale]


class _Measured(TiledExecutor):
    """A small black image, of one block, and `peaks`: the most bytes of the whole, of a tile, of a block at a time."""

    def __init__(self, upscaler: Upscaler, side: int, scale: float | None) -> None:
        black = np.zeros((side, side, 3), np.uint8)
        size = upscaler.output_size(side, side, scale)
        super().__init__(upscaler, PaddedImage(black), size, Plan(side, side, MAPS))
        self.blocks = self.blocks[:1]  # the others are like it
        self.pixels, self.peak = self.size[0] * self.size[1], 0
        self.peaks = [peak_of(lambda: whole(upscaler, black, scale), upscaler.device)]
        deque(self.run(), maxlen=0)
        self.peaks.append(self.peak)

    def attempt(self, compute: Callable[[Region], None], tile: Region, align: int) -> None:
        attempt = super().attempt
        self.peak = max(self.peak, peak_of(lambda: attempt(compute, tile, align), self.device))

    def rows(self, features: FeatureMap) -> Iterator[Tensor]:
        self.peaks.append(self.peak)
        self.peak = 0
        return super().rows(features)


def whole(upscaler: Upscaler, image: Any, scale: float | None) -> Tensor:
    """The image enlarged at once, (3, H', W'), on the CPU."""
    padded = PaddedImage(image)
    x = padded.read(Region(0, 0, padded.height, padded.width), upscaler.device)
    return upscaler(x, scale)[0].cpu()


def fits(upscaler: Upscaler, image: PaddedImage, scale: float | None, max_memory: int | None) -> bool:
    """True if the whole image can be enlarged at once."""
    pixels = image.height * image.width // upscaler.net.unshuffle_factor**2
    on_cpu = upscaler.device.type == "cpu"
    return costs_of(upscaler, scale).whole.of(pixels) <= (_host(max_memory) if on_cpu else _device(upscaler.device))


def plan_for(
    upscaler: Upscaler,
    image: PaddedImage,
    out_size: tuple[int, int],
    scale: float | None,
    max_memory: int | None,
    tile: int = 0,
) -> Plan:
    """The largest tiles that fit, and as many maps in memory as fit beside them.

    Args:
        out_size: (H', W') of the result.
        max_memory: bytes of the host's memory that the process may have in all; None for most of what is free.
        tile: above 0, the largest side in pixels of the image, rounded up to whole windows.

    Raises:
        UserError: not even the smallest do.
    """
    net, costs = upscaler.net, costs_of(upscaler, scale)
    window, size = net.window_size, (image.height // net.unshuffle_factor, image.width // net.unshuffle_factor)
    head = net.head((image.image.shape[0], image.image.shape[1]), size, out_size)
    reaches = [large_kernel_reach(block, pair) for block in net.blocks for pair in range(len(block.pconvs))]  # type: ignore[arg-type]
    margin = max(2 + max(reaches, default=0), head.margin if head.prepares else 0)
    largest = LARGEST_TILE if not tile else min(LARGEST_TILE, -(-tile // (window * net.unshuffle_factor)) * window)
    on_cpu = upscaler.device.type == "cpu"

    def area(side: int) -> int:
        """Pixels of the largest tile with its margin."""
        rows, columns = (min(_longest(length, side, window) + 2 * margin, length) for length in size)
        return rows * columns

    def band_bytes(side: int) -> int:
        return 12 * _longest(out_size[0], round(side * head.enlargement), head.align) * out_size[1]

    def tile_bytes(side: int) -> float:
        return costs.tile.of(area(side))

    def block_bytes(side: int) -> float:
        rows, columns = (
            min(_longest(length, round(side * head.enlargement), head.align) / head.enlargement + 2 * head.margin, most)
            for length, most in zip(out_size, size, strict=True)
        )
        return costs.block.of(math.ceil(rows * columns)) + (band_bytes(side) if on_cpu else 0)

    def largest_sides(budget: float) -> tuple[int | None, int | None]:
        tiles = range(max(largest // window, 1) * window, 0, -window)
        blocks = range(max(largest, LEAST_HEAD_TILE), LEAST_HEAD_TILE - 1, -LEAST_HEAD_TILE)
        return (
            next((side for side in tiles if tile_bytes(side) <= budget), None),
            next((side for side in blocks if block_bytes(side) <= budget), None),
        )

    host = _host(max_memory)
    map_bytes = size[0] * size[1] * costs.channels * upscaler.precision.itemsize
    if not on_cpu:  # tiles are in the device's memory, maps in the host's, with copies of a tile on the way
        side, block = largest_sides(_device(upscaler.device))
        side, block = side or window, block or LEAST_HEAD_TILE  # what is free there changes: it is tried
        copies = 4 * area(side) * costs.channels * 4 + band_bytes(block)
        return Plan(side, block, max(0, min(MAPS, int((host - copies) // map_bytes))))
    side, block = largest_sides(host - MAPS * map_bytes)
    if side and block and side >= min(LEAST_TILE_FOR_MEMORY, largest, max(size)):
        return Plan(side, block, MAPS)
    side, block = largest_sides(host)
    if side is None or block is None:
        needed, name = max(tile_bytes(window), block_bytes(LEAST_HEAD_TILE)), upscaler.source.name
        if max_memory is None:
            raise UserError(
                f"There is too little memory: {name} needs {format_memory(needed)} for its smallest parts, and may "
                f"take {format_memory(max(host, 0))} of what is free."
            )
        taken = max_memory - host
        raise UserError(
            f"max_memory: {format_memory(max_memory)} given; {name} needs at least {format_memory(taken + needed)}, of "
            f"which the program takes {format_memory(taken)} already."
        )
    rest = host - max(tile_bytes(side), block_bytes(block))
    return Plan(side, block, min(MAPS, int(rest // map_bytes)))


def _longest(length: int, largest: int, align: int) -> int:
    """Longest tile along one side."""
    return max(last - first for first, last in cuts(length, largest, align))


def _host(max_memory: int | None) -> float:
    return SHARE * available() if max_memory is None else max_memory - resident()


def _device(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return SHARE * (free - torch.cuda.memory_allocated(device))
