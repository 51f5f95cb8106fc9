"""How large the tiles may be, and where feature maps are, within so much memory."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

from .memory import available, format_memory, peak_of, resident
from .network import Upscaler
from .regions import PaddedImage, cuts
from .tiled_executor import MAPS, Plan, TiledExecutor, large_kernel_reach

__all__ = ["Cost", "PeakMemory", "fits", "peak_memory", "plan_for", "whole"]

#: Tiles of this side have margins of a few percent; larger ones gain nothing.
LARGEST_TILE = 512
#: Tiles are not made smaller than this to keep features in memory rather than in files.
LEAST_TILE_FOR_MEMORY = 192
#: What operators take for themselves, and what the allocator loses, beside the tensors that can be counted.
OVERHEAD = 1.3
#: The share of free memory that is used where nobody says how much.
SHARE = 0.7


class Cost(NamedTuple):
    """The bytes that a computation takes: for itself, and for each pixel of the features."""

    fixed: float
    per_pixel: float

    def of(self, pixels: int) -> float:
        return OVERHEAD * (self.fixed + self.per_pixel * pixels)


class PeakMemory(NamedTuple):
    """What a network takes: for an image at once, for a tile or a block of the result; and channels of its features."""

    whole: Cost
    part: Cost
    channels: int


_measured: weakref.WeakKeyDictionary[Upscaler, dict[float | None, PeakMemory]] = weakref.WeakKeyDictionary()


def peak_memory(upscaler: Upscaler, scale: float | None) -> PeakMemory:
    """Measured once for each network and scale, on two small images."""
    of_network = _measured.setdefault(upscaler, {})
    if scale not in of_network:
        unit = upscaler.net.window_size * upscaler.net.unshuffle_factor
        # LTE computes so many points at a time, which both images should have
        least = 32 if not upscaler.any_scale else max(32, min(64, 128 / (scale or upscaler.scale)))
        side = math.ceil(least / unit) * unit
        small, large = _peaks(upscaler, side, scale), _peaks(upscaler, 2 * side, scale)
        costs = []
        for first, second in zip(small[:2], large[:2], strict=True):
            per_pixel = max(0, second - first) / (large.pixels - small.pixels)
            costs.append(Cost(max(0.0, first - per_pixel * small.pixels), per_pixel))
        of_network[scale] = PeakMemory(*costs, large.channels)
    return of_network[scale]


class _Peaks(NamedTuple):
    whole: int
    part: int
    pixels: int
    channels: int


def _peaks(upscaler: Upscaler, side: int, scale: float | None) -> _Peaks:
    """Of a black image, at once and as a single part. The latter includes its share of the maps and the result."""
    black = np.zeros((side, side, 3), np.uint8)
    size = upscaler.output_size(side, side, scale)
    executor = TiledExecutor(upscaler, PaddedImage(black), size, Plan(side))
    executor.blocks = executor.blocks[:1]  # the others are like it
    at_once = peak_of(lambda: whole(upscaler, black, scale), upscaler.device)
    part = peak_of(lambda: deque(executor.run(), maxlen=0), upscaler.device)
    return _Peaks(at_once, part, executor.size[0] * executor.size[1], executor.channels)


def whole(upscaler: Upscaler, image: Any, scale: float | None) -> Tensor:
    """The image enlarged at once, (3, H', W'), on the CPU."""
    padded = PaddedImage(image)
    x = padded.read(Region(0, 0, padded.height, padded.width), upscaler.device)
    return upscaler(x, scale)[0].cpu()


def fits(upscaler: Upscaler, image: PaddedImage, scale: float | None, max_memory: int | None) -> bool:
    """True if the whole image can be enlarged at once."""
    pixels = image.height * image.width // upscaler.net.unshuffle_factor**2
    on_cpu = upscaler.device.type == "cpu"
    return peak_memory(upscaler, scale).whole.of(pixels) <= (_host(max_memory) if on_cpu else _device(upscaler.device))


def plan_for(
    upscaler: Upscaler,
    image: PaddedImage,
    out_size: tuple[int, int],
    scale: float | None,
    max_memory: int | None,
    tile: int = 0,
) -> Plan:
    """The largest tiles that fit, with the feature maps in memory if they fit beside large ones.

    Args:
        out_size: (H', W') of the result.
        max_memory: bytes of the host's memory that the process may have in all; None for most of what is free.
        tile: above 0, the largest side in pixels of the image, rounded up to whole windows.

    Raises:
        UserError: not even the smallest tiles fit.
    """
    net, peak, host = upscaler.net, peak_memory(upscaler, scale), _host(max_memory)
    window, size = net.window_size, (image.height // net.unshuffle_factor, image.width // net.unshuffle_factor)
    head = net.head((image.image.shape[0], image.image.shape[1]), size, out_size)
    reaches = [large_kernel_reach(block, pair) for block in net.blocks for pair in range(len(block.pconvs))]  # type: ignore[arg-type]
    margin = max(2 + max(reaches, default=0), head.margin)
    largest = min(LARGEST_TILE, -(-tile // (window * net.unshuffle_factor)) * window) if tile else LARGEST_TILE
    sides = range(max(largest // window, 1) * window, 0, -window)

    def part_bytes(side: int) -> float:
        """Of the largest tile, with its margin."""
        rows, columns = (min(_longest(length, side, window) + 2 * margin, length) for length in size)
        return peak.part.of(rows * columns)

    def band_bytes(side: int) -> int:
        """Of the rows of the result that are computed together."""
        return 12 * _longest(out_size[0], round(side * head.enlargement), head.align) * out_size[1]

    maps = MAPS * size[0] * size[1] * peak.channels * upscaler.precision.itemsize
    if (
        upscaler.device.type != "cpu"
    ):  # maps are in the host's memory; what is free in the device's changes: it is tried
        free = _device(upscaler.device)
        side = next((side for side in sides if part_bytes(side) <= free), window)
        return Plan(side, maps + part_bytes(side) + band_bytes(side) > host)
    needed = {side: part_bytes(side) + band_bytes(side) for side in sides}
    side = next((side for side in sides if needed[side] + maps <= host), 0)
    if side >= min(LEAST_TILE_FOR_MEMORY, sides[0], max(size)):
        return Plan(side)
    if side := next((side for side in sides if needed[side] <= host), 0):
        return Plan(side, in_files=True)
    name, least = upscaler.source.name, needed[sides[-1]]
    if max_memory is None:
        raise UserError(
            f"There is too little memory: {name} needs {format_memory(least)} for its smallest parts, and may take "
            f"{format_memory(max(host, 0))} of what is free."
        )
    taken = max_memory - host
    raise UserError(
        f"max_memory: {format_memory(max_memory)} given; {name} needs at least {format_memory(taken + least)}, of "
        f"which the program takes {format_memory(taken)} already."
    )


def _longest(length: int, largest: int, align: int) -> int:
    """Longest tile along one side."""
    return max(last - first for first, last in cuts(length, largest, align))


def _host(max_memory: int | None) -> float:
    return SHARE * available() if max_memory is None else max_memory - resident()


def _device(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return SHARE * (free - torch.cuda.memory_allocated(device))
