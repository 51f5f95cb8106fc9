"""A network a step at a time, each step over the whole image in tiles; see `large_images`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.modules import ESCBlock, fused
from esc_arch.ops.window_attention import window_attention

from .feature_maps import FeatureMap, MapInFile, MapInMemory, check_space
from .memory import is_out_of_memory, peak_of, release, trim_heap
from .network import Upscaler
from .planning import MAPS, Plan, reach_of
from .regions import Picture, Region, grid
from .tails import Tail, blocks_of, folding_of

__all__ = ["Progress", "TiledExecutor", "Write"]

#: Called with the place (top, left) of a block of the result, and the block (3, h, w), float32 on the CPU.
Write = Callable[[int, int, Tensor], None]
#: Called with the part of the work that is done, 0 .. 1.
Progress = Callable[[float], None]


Self = TypeVar("Self", bound="TiledExecutor")


class TiledExecutor:
    """The steps of a network over a whole image, in tiles. A context, which closes the feature maps at its end.

    Arguments as of `large_images.enlarge_exactly`.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        picture: Picture,
        plan: Plan,
        scratch: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.upscaler, self.picture, self.plan = upscaler, picture, plan
        self.device, self.net = upscaler.device, upscaler.net
        self.blocks = blocks_of(upscaler.net)
        self.folding = folding_of(self.net)
        self.height, self.width = picture.height // self.folding, picture.width // self.folding
        self.scratch, self.progress = scratch, progress
        self.maps = ExitStack()
        self.free_maps: list[FeatureMap] = []
        self.maps_in_memory = 0
        self.checked_space = False
        #: TiledExecutor that there are, for `progress`, and those that are done.
        self.count = self.done = 0
        #: A larger tile did not fit into the device's memory.
        self.largest_area = float("inf")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.maps.close()

    # --- maps -------------------------------------------------------------------------------------------------------

    def new_map(self, channels: int) -> FeatureMap:
        """A map of the features' size: one that was given back, or a new one."""
        for index, each in enumerate(self.free_maps):
            if each.channels == channels:
                return self.free_maps.pop(index)
        self.close_free_maps()
        shape = (channels, self.height, self.width, self.upscaler.precision)
        pinned = self.device.type == "cuda"
        made: FeatureMap
        if self.maps_in_memory < self.plan.maps_in_memory:
            self.maps_in_memory += 1
            made = MapInMemory(*shape, pinned=pinned)
        else:
            made = MapInFile(*shape, pinned=pinned, folder=self.scratch, total=self._in_files(channels))
        self.maps.callback(made.close)
        return made

    def _in_files(self, channels: int) -> int:
        """The bytes of all maps that are to be in files, for which there must be room."""
        size = channels * self.upscaler.precision.itemsize * self.height * self.width
        total = (MAPS - self.plan.maps_in_memory) * size
        if not self.checked_space:
            check_space(self.scratch, total)
            self.checked_space = True
        return total

    def close_free_maps(self) -> None:
        while self.free_maps:
            free = self.free_maps.pop()
            self.maps_in_memory -= isinstance(free, MapInMemory)
            free.close()

    # --- tiles ------------------------------------------------------------------------------------------------------

    def each(self, compute: Callable[[Region], None]) -> None:
        """Call `compute` with every tile of the features; they begin at multiples of the attention's window."""
        window = self.net.window_size
        total = self.height * self.width
        done = 0
        for tile in grid(self.height, self.width, self.plan.tile, window):
            for _ in self._attempt(compute, tile, window):
                pass
            trim_heap()
            done += tile.area
            self._tell(done / total)
        self.done += 1

    def _attempt(self, compute: Callable[[Region], Any], tile: Region, align: int) -> Iterator[tuple[Region, Any]]:
        """Compute a tile, or its parts where the device has not enough memory for it: from then on for all."""
        halves = tile.halves(align)
        if tile.area <= self.largest_area or halves is None:
            try:
                with self.upscaler.computing():
                    result = compute(tile)
                yield tile, result
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
            release(self.device)
        for half in halves:
            yield from self._attempt(compute, half, align)

    def _tell(self, part: float) -> None:
        if self.progress is not None:
            self.progress((self.done + part) / self.count)

    # --- the network ------------------------------------------------------------------------------------------------

    def features(self) -> FeatureMap:
        """What is behind the blocks."""
        features = self.shallow_features()
        kernels = self.net.large_kernels()
        for block in self.blocks:
            assert isinstance(block, ESCBlock)
            features = self.run_block(block, features, kernels)
        return features

    def shallow_features(self) -> FeatureMap:
        """The first convolution, whose inputs are read from the image."""
        shallow: FeatureMap | None = None

        def compute(tile: Region) -> None:
            nonlocal shallow
            region = tile.grown(1, self.height, self.width)
            x = self.net.shallow_features(self.picture.read(region.times(self.folding), self.device))
            if shallow is None:
                shallow = self.new_map(x.shape[1])
            shallow.write(tile, tile.of(region, x))

        self.each(compute)
        assert shallow is not None
        return shallow

    def run_block(self, block: ESCBlock, skip: FeatureMap, kernels: Sequence[Tensor]) -> FeatureMap:
        """A block, whose result takes the place of its input: the last step needs that only where it writes."""
        x, other = self.new_map(skip.channels), self.new_map(skip.channels)
        self.attend(block, skip, x)
        pairs = len(block.pconvs)
        means = self.first_means(block, x)
        for pair in range(pairs - 1):
            means = self.convolve(block, pair, x, other, means, kernels)
            x, other = other, x
        self.convolve_and_finish(block, x, skip, means, kernels)
        self.free_maps += [x, other]
        return skip

    def attend(self, block: ESCBlock, source: FeatureMap, target: FeatureMap) -> None:
        """The block's first ConvFFN and its attention, whose windows no tile cuts."""
        margin = 1 if block.attn.gate is None else 2  # the gate sees neighbours of what attention sees

        def compute(tile: Region) -> None:
            region = tile.grown(margin, self.height, self.width)
            x = fused.first_ffn(block, source.read(region, self.device))
            if block.attn.gate is None:
                out = fused.window_attention(block.attn, block.ln_attn, _part(tile, region, x))
            else:
                out = _gated(block, x, tile, region)
            target.write(tile, out)

        self.each(compute)

    def first_means(self, block: ESCBlock, source: FeatureMap) -> Tensor:
        """Means for the first pair; those for the others are summed where its predecessor is computed."""
        sums = _Sums(self.height * self.width)

        def compute(tile: Region) -> None:
            region = tile.grown(1, self.height, self.width)
            sums.add(_pooled(block, 0, source.read(region, self.device), tile, region))

        if len(block.pconvs):
            self.each(compute)
        return sums.means()

    def convolve(
        self,
        block: ESCBlock,
        pair: int,
        source: FeatureMap,
        target: FeatureMap,
        means: Tensor,
        kernels: Sequence[Tensor],
    ) -> Tensor:
        """A pair that another one follows; returns the means for that one."""
        sums = _Sums(self.height * self.width)

        def compute(tile: Region) -> None:
            x, inner = self._pair(block, pair, source, tile, means, kernels)
            target.write(tile, tile.of(inner, x))
            sums.add(_pooled(block, pair + 1, x, tile, inner))

        self.each(compute)
        return sums.means()

    def convolve_and_finish(
        self,
        block: ESCBlock,
        source: FeatureMap,
        skip: FeatureMap,
        means: Tensor,
        kernels: Sequence[Tensor],
    ) -> None:
        """The last pair, if there is one, and the block's last convolution, written over its input."""

        def compute(tile: Region) -> None:
            x, inner = self._pair(block, len(block.pconvs) - 1, source, tile, means, kernels)
            x = fused.finish(block, x, skip.read(inner, self.device))
            skip.write(tile, tile.of(inner, x))

        self.each(compute)

    def _pair(
        self,
        block: ESCBlock,
        pair: int,
        source: FeatureMap,
        tile: Region,
        means: Tensor,
        kernels: Sequence[Tensor],
    ) -> tuple[Tensor, Region]:
        """A pair's result on a tile and a pixel around it, and where that is."""
        inner = tile.grown(1, self.height, self.width)
        if pair < 0:
            return source.read(inner, self.device), inner
        margin = 1 + reach_of(block, pair)
        region = inner.grown(margin, self.height, self.width)
        x = source.read(region, self.device)
        mixed, _ = fused.mix(block, pair, x)
        return _part(inner, region, fused.convolve(block, pair, x, mixed, means, *kernels)), inner

    def write_blocks(self, tail: Tail, features: FeatureMap, write: Write) -> None:
        """The last pass: from features to blocks of the result."""
        self.close_free_maps()
        height, width = tail.size
        done = 0
        for out in grid(height, width, round(self.plan.tail_tile * tail.enlargement), tail.align):
            whole: Tensor | None = None
            for part, block in self._attempt(lambda region: tail.block(region, features), out, tail.align):
                if part == out:
                    whole = block.cpu()
                else:
                    whole = torch.empty(3, *out.size) if whole is None else whole
                    part.of(out, whole).copy_(block)
            assert whole is not None
            write(out.top, out.left, whole)
            del whole, block
            trim_heap()
            done += out.area
            self._tell(done / (height * width))


class _Sums:
    """Sums of channels over a map, and the means of it."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def means(self) -> Tensor:
        return torch.zeros(0) if self.sums is None else (self.sums / self.pixels).float()


def _part(inner: Region, outer: Region, x: Tensor) -> Tensor:
    return x if inner == outer else inner.of(outer, x).contiguous(memory_format=torch.channels_last)


def _pooled(block: ESCBlock, pair: int, x: Tensor, tile: Region, region: Region) -> Tensor:
    """Sums (1, pdim) over a tile of what a pair's kernel is made from; x shows `region`."""
    mixed, _ = fused.mix(block, pair, x)
    return tile.of(region, mixed[:, : fused.channels_pooled(block, pair)]).sum((2, 3), dtype=torch.float64)


def _gated(block: ESCBlock, x: Tensor, tile: Region, region: Region) -> Tensor:
    """`fused.window_attention` of a tile, where the gate sees what is around it."""
    attn = block.attn
    assert attn.gate is not None
    normed = block.ln_attn(x)
    qkv = attn.to_qkv(_part(tile, region, normed))
    bias = attn.position_bias()
    attended = window_attention(qkv, bias, window=attn.window_size, heads=attn.num_heads, backend=attn.attn_type)
    gate = tile.of(region, attn.gate(normed)).sigmoid()
    return tile.of(region, x) + attn.to_out(attended * gate)


class Measured(TiledExecutor):
    """The steps of one block and the tail, whose tiles are counted in `peak`: the most bytes that one of them takes."""

    def __init__(self, upscaler: Upscaler, picture: Picture, plan: Plan) -> None:
        super().__init__(upscaler, picture, plan)
        self.blocks = self.blocks[:1]  # the others are like it
        self.peak = 0

    def _attempt(self, compute: Callable[[Region], Any], tile: Region, align: int) -> Iterator[tuple[Region, Any]]:
        attempt = super()._attempt
        results: list[tuple[Region, Any]] = []
        self.peak = max(self.peak, peak_of(lambda: results.extend(attempt(compute, tile, align)), self.device))
        yield from results
