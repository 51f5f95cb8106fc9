"""How large the tiles may be, and where feature maps lie, within so much memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.modules import ESCBlock

from .memory import available, format_memory, peak_of, resident
from .network import Upscaler
from .regions import Picture, Region, cuts
from .tails import blocks_of, folding_of, tail_for

__all__ = ["MAPS", "Cost", "Costs", "Plan", "costs_of", "fits", "plan_for", "reach_of", "whole"]

#: Maps that the blocks need: a block's input, and what a pair of layers reads and writes.
MAPS = 3
#: Tiles of this side have margins of a few percent; larger ones gain nothing.
LARGEST_TILE = 512
#: Tiles are not made smaller than this to keep features in memory rather than in files.
LEAST_TILE_FOR_MEMORY = 192
#: Blocks of the result are not made of smaller tiles than this.
LEAST_TAIL_TILE = 8
#: What operators take for themselves, and what the allocator loses, beside the tensors that can be counted.
OVERHEAD = 1.3
#: Of the memory that is free, so much is used where nobody says how much.
SHARE = 0.7


@dataclass(frozen=True)
class Plan:
    """How an image is computed in parts.

    Attributes:
        tile: side of the tiles of the features, in pixels of these.
        tail_tile: the same of the blocks of the result.
        maps_in_memory: how many of `MAPS` feature maps are in memory; the others are in files.
    """

    tile: int
    tail_tile: int
    maps_in_memory: int


@dataclass(frozen=True)
class Cost:
    """The bytes that a computation takes: for itself, and for each pixel of the features."""

    fixed: float
    per_pixel: float

    @classmethod
    def measured(cls, small: tuple[int, int], large: tuple[int, int]) -> Cost:
        """From two numbers of pixels with their bytes."""
        per_pixel = max(0, large[1] - small[1]) / (large[0] - small[0])
        return cls(max(0.0, small[1] - per_pixel * small[0]), per_pixel)

    def of(self, pixels: int) -> float:
        return OVERHEAD * (self.fixed + self.per_pixel * pixels)


@dataclass(frozen=True)
class Costs:
    """Of a network: the whole at once, a tile of the features in its dearest step, a block of the result."""

    whole: Cost
    tile: Cost
    block: Cost
    channels: int


_costs: weakref.WeakKeyDictionary[Upscaler, dict[float | None, Costs]] = weakref.WeakKeyDictionary()


def costs_of(upscaler: Upscaler, scale: float | None) -> Costs:
    """Measured once for each network and scale, on two small images."""
    of_network = _costs.setdefault(upscaler, {})
    if scale not in of_network:
        unit = upscaler.net.window_size * folding_of(upscaler.net)
        # LTE computes so many points at a time, which both images should have
        least = 32 if not upscaler.any_scale else max(32, min(64, 128 / (scale or upscaler.scale)))
        side = math.ceil(least / unit) * unit
        small, large = (_Trial(upscaler, side * factor, scale) for factor in (1, 2))
        whole, tile, block = (
            Cost.measured((small.pixels, getattr(small, part)), (large.pixels, getattr(large, part)))
            for part in ("whole", "tile", "block")
        )
        of_network[scale] = Costs(whole, tile, block, large.channels)
    return of_network[scale]


class _Trial:
    """A small image, and the bytes that it takes."""

    @torch.no_grad()
    def __init__(self, upscaler: Upscaler, side: int, scale: float | None) -> None:
        from .tiled_executor import Measured

        image = np.zeros((side, side, 3), np.uint8)
        size = upscaler.output_size(side, side, scale)
        picture = Picture(image, upscaler.window)
        self.pixels = (side // folding_of(upscaler.net)) ** 2
        self.whole = peak_of(lambda: whole(upscaler, image, scale), upscaler.device)
        with Measured(upscaler, picture, Plan(side, side, MAPS)) as passes:
            tail = tail_for(upscaler, picture, size)
            features = tail.prepare(passes, passes.features())
            self.tile, passes.peak = passes.peak, 0
            passes.write_blocks(tail, features, lambda top, left, block: None)
            self.block = passes.peak
            self.channels = features.channels


def reach_of(block: ESCBlock, pair: int) -> int:
    """How far the large kernel of a pair reaches."""
    size: int = block.pconvs[pair].kernel_size  # type: ignore[assignment]  # all kinds have one
    return size // 2


def whole(upscaler: Upscaler, image: Any, scale: float | None) -> Tensor:
    """The image enlarged at once, (3, H', W'), on the CPU."""
    picture = Picture(image)
    x = picture.read(Region(0, 0, picture.height, picture.width), upscaler.device)
    return upscaler(x, scale)[0].cpu()


def fits(upscaler: Upscaler, picture: Picture, scale: float | None, max_memory: int | None) -> bool:
    """Whether the whole image can be enlarged at once."""
    pixels = picture.height * picture.width // folding_of(upscaler.net) ** 2
    cost = costs_of(upscaler, scale).whole.of(pixels)
    return cost <= (_of_host(max_memory) if upscaler.device.type == "cpu" else _of_device(upscaler.device))


def plan_for(
    upscaler: Upscaler, picture: Picture, size: tuple[int, int], scale: float | None, max_memory: int | None
) -> Plan:
    """The largest tiles that fit, and as many maps in memory as fit beside them.

    Raises:
        UserError: not even the smallest do.
    """
    costs = costs_of(upscaler, scale)
    planner = _Planner(upscaler, picture, size, costs)
    host = _of_host(max_memory)
    if upscaler.device.type == "cpu":
        return planner.on_host(host, max_memory)
    return planner.on_device(host, _of_device(upscaler.device))


class _Planner:
    def __init__(self, upscaler: Upscaler, picture: Picture, size: tuple[int, int], costs: Costs) -> None:
        net, folding = upscaler.net, folding_of(upscaler.net)
        self.upscaler, self.costs = upscaler, costs
        self.height, self.width = picture.height // folding, picture.width // folding
        self.window = net.window_size
        tail = tail_for(upscaler, picture, size)
        self.tail = tail
        reaches = [reach_of(block, pair) for block in blocks_of(net) for pair in range(len(block.pconvs))]
        self.margin = max(2 + max(reaches, default=0), tail.margin if tail.passes else 0)
        self.map_bytes = self.height * self.width * costs.channels * upscaler.precision.itemsize

    def on_host(self, budget: float, max_memory: int | None) -> Plan:
        """Tiles and maps share the memory."""
        for side in self._sides():
            rest = budget - MAPS * self.map_bytes
            if self._tile_bytes(side) <= rest and (side >= LEAST_TILE_FOR_MEMORY or side >= self.__longest_part()):
                block = self._largest_block(rest)
                if block is not None:
                    return Plan(side, block, MAPS)
        tile, block = self._largest_tile(budget), self._largest_block(budget)
        if tile is None or block is None:
            raise self._too_little(budget, max_memory)
        rest = budget - max(self._tile_bytes(tile), self._block_bytes(block))
        return Plan(tile, block, min(MAPS, int(rest // self.map_bytes)))

    def on_device(self, host: float, device: float) -> Plan:
        """Tiles are in the device's memory, maps in the host's, with copies of a tile on the way."""
        tile, block = self._largest_tile(device), self._largest_block(device)
        tile, block = tile or self.window, block or LEAST_TAIL_TILE  # what is free there changes: it is tried
        copies = 4 * self._area(tile, self.window, self.margin) * self.costs.channels * 4
        return Plan(tile, block, max(0, min(MAPS, int((host - copies) // self.map_bytes))))

    def _too_little(self, budget: float, max_memory: int | None) -> UserError:
        needed = max(self._tile_bytes(self.window), self._block_bytes(LEAST_TAIL_TILE))
        if max_memory is None:
            return UserError(
                f"There is too little memory: {self.upscaler.source.name} needs {format_memory(needed)} for its "
                f"smallest parts, and may take {format_memory(max(budget, 0))} of what is free."
            )
        taken = max_memory - budget
        return UserError(
            f"max_memory: {format_memory(max_memory)} given; {self.upscaler.source.name} needs at least "
            f"{format_memory(taken + needed)}, of which the program takes {format_memory(taken)} already."
        )

    def _largest_tile(self, budget: float) -> int | None:
        return next((side for side in self._sides() if self._tile_bytes(side) <= budget), None)

    def _largest_block(self, budget: float) -> int | None:
        sides = range(LARGEST_TILE, LEAST_TAIL_TILE - 1, -LEAST_TAIL_TILE)
        return next((side for side in sides if self._block_bytes(side) <= budget), None)

    def _sides(self) -> Iterable[int]:
        return range(max(LARGEST_TILE // self.window, 1) * self.window, 0, -self.window)

    def _tile_bytes(self, side: int) -> float:
        return self.costs.tile.of(self._area(side, self.window, self.margin))

    def _block_bytes(self, side: int) -> float:
        enlargement = self.tail.enlargement
        height, width = (
            _longest_part(length, round(side * enlargement), self.tail.align) / enlargement + 2 * self.tail.margin
            for length in self.tail.size
        )
        return self.costs.block.of(math.ceil(min(height, self.height) * min(width, self.width)))

    def _area(self, side: int, align: int, margin: int) -> int:
        """The pixels of the largest tile with its margin."""
        height, width = (
            min(_longest_part(length, side, align) + 2 * margin, length) for length in (self.height, self.width)
        )
        return height * width

    def __longest_part(self) -> int:
        return max(self.height, self.width)


def _longest_part(length: int, most: int, align: int) -> int:
    """Longest tile along one side."""
    return max(last - first for first, last in cuts(length, most, align))


def _of_host(max_memory: int | None) -> float:
    return SHARE * available() if max_memory is None else max_memory - resident()


def _of_device(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return SHARE * (free - torch.cuda.memory_allocated(device))
