"""Images of any size in bounded memory: the whole-image result, computed in parts.

ConvAttn makes kernels from means over the whole image, so a network that is run over tiles gives another image in
each. Here the network is run a step at a time instead, each step over the whole image in tiles: features lie in host
memory or in temporary files, a tile is read with as much around it as the step sees, and the means that the next step
needs are summed on the way. At the borders of the image the layers' own padding acts, as ever.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

from .memory import available, format_memory, is_out_of_memory, peak_of, release, resident
from .network import Upscaler
from .other_networks import OVERLAP, OtherNetwork
from .tiled_executor import MAPS, PaddedImage, Plan, TiledExecutor, cuts, large_kernel_reach

__all__ = ["Cost", "costs_of", "enlarge", "plan_for", "whole"]

logger = logging.getLogger("esc_arch")

#: Tiles of this side have margins of a few percent; larger ones gain nothing.
LARGEST_TILE = 512
#: Tiles are not made smaller than this to keep features in memory rather than in files.
LEAST_TILE_FOR_MEMORY = 192
#: Sides of tiles of other networks, one of which fits into the memory.
OTHER_TILES = (512, 256, 128, 64)
#: What operators take for themselves, and what the allocator loses, beside the tensors that can be counted.
OVERHEAD = 1.3
#: The share of free memory that is used where nobody says how much.
SHARE = 0.7


def enlarge(
    upscaler: Upscaler,
    image: npt.NDArray[Any],
    *,
    scale: float | None = None,
    max_memory: int | None = None,
    tile: int = 0,
    scratch: Path | None = None,
    progress: Callable[[float], Any] | None = None,
    at_once: bool = True,
) -> Iterator[Tensor]:
    """Enlarge an image of any size: at once where that fits into memory and `tile`, else in parts.

    In float32, parts are within 1e-5 of the whole; those of an `OtherNetwork` are only close to it. Memory that runs
    out in spite of the estimate is answered by parts, with a warning.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1. It may be a mapped file.
        scale: of ESCLTE, any; others have their own.
        max_memory: bytes of the host's memory that the process may take in all, which it has a part of already; None
            for most of what is free. What the caller keeps comes on top. Features for which there is no room go to
            temporary files.
        tile: above 0, the largest side of parts in pixels of the image, rounded up to whole windows.
        scratch: the folder of temporary files; None for the system's.
        progress: told the part of the work that is done, 0 .. 1.
        at_once: False for parts in any case.

    Yields:
        Rows of the result from the top to the bottom, (3, h, W'), float32 on the CPU.

    Raises:
        UserError: a scale that the network has not; too little memory or room for files, with what is needed; an
            array that is no image.
    """
    # The padding of the protocol, and of the network itself
    padded = PaddedImage(image, upscaler.net.window_size, upscaler.net.unshuffle_factor)
    height, width = image.shape[:2]
    tell: Callable[[float], Any] = progress or (lambda part: None)
    out_size, is_other = upscaler.output_size(height, width, scale), isinstance(upscaler.net, OtherNetwork)
    free = _host(max_memory) if upscaler.device.type == "cpu" else _device(upscaler.device)
    pixels = padded.height * padded.width // upscaler.net.unshuffle_factor**2
    if at_once and not 0 < tile < max(height, width) and costs_of(upscaler, scale)[0].of(pixels) <= free:
        try:
            enlarged = whole(upscaler, image, scale, tell)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "Memory ran out for the image of %d x %d pixels as a whole: it is computed in parts%s.",
                *(width, height, "" if is_other else ", with the same result"),
            )
        else:
            tell(1)
            yield enlarged
            return
        release(upscaler.device)  # after the exception, whose frames hold tensors
    if is_other:
        yield from _in_overlapping_tiles(upscaler, padded, tile, free, tell)
        return
    plan = plan_for(upscaler, padded, out_size, scale, max_memory, tile)
    yield from TiledExecutor(upscaler, padded, out_size, plan, scratch, progress).run()


def _in_overlapping_tiles(
    upscaler: Upscaler, image: PaddedImage, tile: int, free: float, progress: Callable[[float], Any]
) -> Iterator[Tensor]:
    """Rows of the result of a network that nothing is known of, in tiles of which the margins are cropped."""
    size, factor = (image.height, image.width), round(upscaler.scale)
    cost = costs_of(upscaler, None)[0]
    needed = {side: cost.of((side + 2 * OVERLAP) ** 2) for side in ([tile] if tile else OTHER_TILES)}
    side = next((side for side in needed if needed[side] <= free), min(needed))
    if needed[side] > free:
        need = f"{format_memory(needed[side])} for tiles of {side} pixels; {format_memory(max(free, 0))} may be taken"
        raise UserError(f"{upscaler.source.name} needs {need}. Raise --max-memory, or use a smaller --tile.")
    for top, bottom in cuts(size[0], side):
        band = torch.empty(3, (bottom - top) * factor, size[1] * factor)
        for left, right in cuts(size[1], side):
            core = Region(top, left, bottom, right)
            seen = core.expand(OVERLAP, size)
            enlarged = upscaler(image.read(seen, upscaler.device))[0]
            band[..., left * factor : right * factor] = core.times(factor).crop(enlarged, seen.times(factor))
            progress((top * size[1] + right * (bottom - top)) / (size[0] * size[1]))
        yield band


class Cost(NamedTuple):
    """The bytes that a computation takes: for itself, and for each pixel of the features."""

    fixed: float
    per_pixel: float

    @classmethod
    def through(cls, pixels: Sequence[int], peaks: Sequence[int]) -> Cost:
        """Of what two images take."""
        per_pixel = max(0, peaks[1] - peaks[0]) / (pixels[1] - pixels[0])
        return cls(max(0.0, peaks[0] - per_pixel * pixels[0]), per_pixel)

    def of(self, pixels: int) -> float:
        return OVERHEAD * (self.fixed + self.per_pixel * pixels)


_costs: weakref.WeakKeyDictionary[Upscaler, dict[float | None, tuple[Cost, Cost]]] = weakref.WeakKeyDictionary()


def costs_of(upscaler: Upscaler, scale: float | None) -> tuple[Cost, Cost]:
    """What a network takes for an image at once, and for a part: measured once for each scale, on two black images.

    That of a part includes its share of the feature maps and of the result.
    """
    of_network = _costs.setdefault(upscaler, {})
    if scale not in of_network:
        unit = upscaler.net.window_size * upscaler.net.unshuffle_factor
        # LTE computes so many points at a time, which both images should have
        least = 32 if not upscaler.any_scale else max(32, min(64, 128 / (scale or upscaler.scale)))
        side = math.ceil(least / unit) * unit
        pixels, at_once, part = zip(*(_peaks(upscaler, factor * side, scale) for factor in (1, 2)), strict=True)
        of_network[scale] = Cost.through(pixels, at_once), Cost.through(pixels, part)
    return of_network[scale]


def _peaks(upscaler: Upscaler, side: int, scale: float | None) -> tuple[int, int, int]:
    """Pixels of the features, and the most bytes at once and as a single part."""
    black = np.zeros((side, side, 3), np.uint8)
    if isinstance(upscaler.net, OtherNetwork):
        peak = peak_of(lambda: whole(upscaler, black, scale), upscaler.device)
        return side * side, peak, peak
    size = upscaler.output_size(side, side, scale)
    executor = TiledExecutor(upscaler, PaddedImage(black), size, Plan(side))
    executor.blocks = executor.blocks[:1]  # the others are like it
    at_once = peak_of(lambda: whole(upscaler, black, scale), upscaler.device)
    part = peak_of(lambda: deque(executor.run(), maxlen=0), upscaler.device)
    return executor.size[0] * executor.size[1], at_once, part


def whole(
    upscaler: Upscaler, image: Any, scale: float | None, progress: Callable[[float], Any] = lambda part: None
) -> Tensor:
    """The image enlarged at once, (3, H', W'), on the CPU; progress is told of each block."""
    padded = PaddedImage(image)
    x = padded.read(Region(0, 0, padded.height, padded.width), upscaler.device)
    blocks, done = list(upscaler.net.blocks), count(1)

    def tell(*_: Any) -> None:
        progress(next(done) / (len(blocks) + 1))

    hooks = [block.register_forward_hook(tell) for block in blocks]
    try:
        return upscaler(x, scale)[0].cpu()
    finally:
        for hook in hooks:
            hook.remove()


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
    net, cost, host = upscaler.net, costs_of(upscaler, scale)[1], _host(max_memory)
    window, size = net.window_size, (image.height // net.unshuffle_factor, image.width // net.unshuffle_factor)
    head = net.head((image.image.shape[0], image.image.shape[1]), size, out_size)
    reaches = [large_kernel_reach(block, pair) for block in net.blocks for pair in range(len(block.pconvs))]  # type: ignore[arg-type]
    margin = max(2 + max(reaches, default=0), head.margin)
    largest = min(LARGEST_TILE, -(-tile // (window * net.unshuffle_factor)) * window) if tile else LARGEST_TILE
    sides = range(max(largest // window, 1) * window, 0, -window)

    def part_bytes(side: int) -> float:
        """Of the largest tile, with its margin."""
        rows, columns = (min(_longest(length, side, window) + 2 * margin, length) for length in size)
        return cost.of(rows * columns)

    def band_bytes(side: int) -> int:
        """Of the rows of the result that are computed together."""
        return 12 * _longest(out_size[0], round(side * head.enlargement), head.align) * out_size[1]

    pixel = image.read(Region(0, 0, 1, 1).times(net.unshuffle_factor), upscaler.device)
    maps = MAPS * size[0] * size[1] * net.shallow_features(pixel).shape[1] * upscaler.precision.itemsize
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
