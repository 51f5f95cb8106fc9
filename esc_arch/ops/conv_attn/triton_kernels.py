"""Kernels of the `triton` backend: ConvAttn's two convolutions in one pass, and their gradients.

Letters: B batch, C channels that are convolved, H and W of the map, K side of the large kernel, R = K // 2,
s side of the dynamic kernel, G outputs of a group.

Sixteen channels are too few columns to keep tensor cores busy, and each pixel would be fetched K times per row of the
kernel. So G neighbouring outputs of a row are taken together: they need G + K - 1 pixels of an input row, and

    out[group, (g, co)] = sum over (dy, j, ci) of x[y + dy - R, G * group + j - R, ci] * band[dy, (j, ci), (g, co)]

where band[dy, (j, ci), (g, co)] = taps[dy, j - g, co, ci], and 0 where j - g is no tap. For K = 13, C = 16 and G = 4
that is a product of (groups, 256) and (256, 64) per row: a fifth of it multiplies zeros, and the input is fetched 4
times per row instead of 13. The band is gathered from the taps as it is needed.

With FOLD rows as far above as below, which meet equal taps of a symmetric kernel, are added before the product: R + 1
products of rows instead of K.

Inputs are channels-last maps, of which PIXEL numbers lie from one pixel to the next, so that the first C channels of a
wider map are read in place. Sizes of maps are arguments that nothing is specialised on: new sizes compile nothing.

This imports triton: import it only where that is known to be there.
"""

# What Triton compiles are its own types, which annotations cannot say
# mypy: disallow_untyped_defs=False, check_untyped_defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton import Config

from esc_arch.ops.triton_jit import dot, tuned

#: The arguments that decide which configuration is the fastest; sizes of maps are not among them.
_KEY = ["C", "PIXEL", "SIDE", "FOLD", "PRECISION"]
_SIZES = ["batch", "height", "width"]

#: A row outside every map.
NOWHERE = tl.constexpr(-1)


def _config(columns, block, warps, stages, depth=64):
    """`columns` of a product are the channels of a group of outputs, `depth` those of its pixels at a time."""
    return Config({"COLUMNS": columns, "DEPTH": depth, "BLOCK": block}, num_warps=warps, num_stages=stages)


@triton.jit
def _groups(program, batch, height, width, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Picture, y, first x, and whether it exists, of a block of the groups of outputs; they are numbered row by row."""
    columns = tl.cdiv(width, GROUP)
    group = program * BLOCK + tl.arange(0, BLOCK)
    line = group // columns
    picture = line // height
    return picture, line % height, group % columns * GROUP, picture < batch


@triton.jit
def _pixels(
    map,
    picture,
    y,
    x,
    wanted,
    height,
    width,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Of COUNT pixels from (y, x) on, the channels: (groups, COUNT * BLOCK_C); zeros outside the map."""
    k = tl.arange(0, COUNT * BLOCK_C)
    channel = k % BLOCK_C
    column = x[:, None] + (k // BLOCK_C)[None, :]
    inside = (wanted & (y >= 0) & (y < height))[:, None] & (column >= 0) & (column < width)
    if C != BLOCK_C:
        inside = inside & (channel < C)[None, :]
    line = (picture.to(tl.int64) * height + y) * width
    return tl.load(map + (line[:, None] + column) * PIXEL + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _rows(
    map,
    picture,
    y,
    x,
    wanted,
    distance,
    height,
    width,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
    FOLD: tl.constexpr,
):
    """The pixels `distance` rows above; with FOLD those as far below are added, which meet the same taps."""
    above = _pixels(map, picture, y - distance, x, wanted, height, width, PIXEL, C, BLOCK_C, COUNT)
    if FOLD:
        row = tl.where(distance > 0, y + distance, NOWHERE)
        below = _pixels(map, picture, row, x, wanted, height, width, PIXEL, C, BLOCK_C, COUNT)
        return (above.to(tl.float32) + below.to(tl.float32)).to(above.dtype)
    else:
        return above


@tuned(
    [
        _config(64, 64, 4, 3),
        _config(64, 128, 4, 3),
        _config(64, 128, 8, 3),
        _config(128, 64, 4, 3),
        _config(64, 32, 4, 2),
    ],
    interpreted=[_config(64, 128, 1, 1, depth=256)],  # few large steps are the quickest
    key=_KEY,
)
@triton.jit(do_not_specialize=_SIZES)
def convolve(
    x,
    taps,
    dynamic,
    out,
    batch,
    height,
    width,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SIDE: tl.constexpr,
    DYNAMIC_SIDE: tl.constexpr,
    OUT_LAST: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the convolutions with `taps` (K, K, C out, C in) and `dynamic` (B, C, s, s), zero padding.

    A program is a block of groups of outputs. `out` is a dense map of C channels, channels last or NCHW.
    """
    GROUP: tl.constexpr = COLUMNS // BLOCK_C
    R: tl.constexpr = SIDE // 2
    picture, y, left, wanted = _groups(tl.program_id(0), batch, height, width, GROUP, BLOCK)
    n = tl.arange(0, GROUP * BLOCK_C)[None, :]
    channel = n % BLOCK_C

    acc = tl.zeros([BLOCK, GROUP * BLOCK_C], tl.float32)
    for number in range(DYNAMIC_SIDE * DYNAMIC_SIDE):
        dy = number // DYNAMIC_SIDE - DYNAMIC_SIDE // 2
        dx = number % DYNAMIC_SIDE - DYNAMIC_SIDE // 2
        neighbours = _pixels(x, picture, y + dy, left + dx, wanted, height, width, PIXEL, C, BLOCK_C, GROUP)
        place = (picture[:, None] * C + channel) * (DYNAMIC_SIDE * DYNAMIC_SIDE) + number
        weight = tl.load(dynamic + place, mask=wanted[:, None] & (channel < C), other=0.0)
        acc += neighbours.to(tl.float32) * weight.to(tl.float32)

    COUNT: tl.constexpr = DEPTH // BLOCK_C
    STEPS: tl.constexpr = (GROUP + SIDE - 1 + COUNT - 1) // COUNT
    ROWS: tl.constexpr = R + 1 if FOLD else SIDE
    # The channels of the input lie side by side, because tensor cores take TF32 in no other order
    k = tl.arange(0, COUNT * BLOCK_C)[:, None]
    for step in range(ROWS * STEPS):
        row = step // STEPS
        first = step % STEPS * COUNT
        pixels = _rows(x, picture, y, left + first - R, wanted, R - row, height, width, PIXEL, C, BLOCK_C, COUNT, FOLD)
        tap = first + k // BLOCK_C - n // BLOCK_C
        known = (tap >= 0) & (tap < SIDE)
        if C != BLOCK_C:
            known = known & (k % BLOCK_C < C) & (channel < C)
        band = tl.load(taps + ((row * SIDE + tap) * C + channel) * C + k % BLOCK_C, mask=known, other=0.0)
        acc += dot(pixels, band, PRECISION)

    column = left[:, None] + n // BLOCK_C
    inside = wanted[:, None] & (column < width) & (channel < C)
    if OUT_LAST:
        line = (picture.to(tl.int64) * height + y) * width
        place = (line[:, None] + column) * C + channel
    else:
        place = ((picture.to(tl.int64)[:, None] * C + channel) * height + y[:, None]) * width + column
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "share"])
def correlate(
    x,
    gradient,
    sums,
    batch,
    height,
    width,
    share,
    PIXEL: tl.constexpr,
    GRADIENT_PIXEL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SIDE: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the band: sums[share, row, (j, ci), (g, co)] of what `gradient` got from each input pixel.

    A program is COUNT pixels of a row of the kernel, for a share of the blocks of groups of outputs.
    """
    R: tl.constexpr = SIDE // 2
    STEPS: tl.constexpr = (GROUP + SIDE - 1 + COUNT - 1) // COUNT
    row = tl.program_id(0) // STEPS
    first = tl.program_id(0) % STEPS * COUNT
    acc = tl.zeros([COUNT * BLOCK_C, GROUP * BLOCK_C], tl.float32)
    for block in range(tl.program_id(1) * share, (tl.program_id(1) + 1) * share):
        picture, y, left, wanted = _groups(block, batch, height, width, GROUP, BLOCK)
        pixels = _rows(x, picture, y, left + first - R, wanted, R - row, height, width, PIXEL, C, BLOCK_C, COUNT, FOLD)
        outputs = _pixels(gradient, picture, y, left, wanted, height, width, GRADIENT_PIXEL, C, BLOCK_C, GROUP)
        acc += dot(tl.trans(pixels), outputs, PRECISION)
    tile = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    k = tl.arange(0, COUNT * BLOCK_C)[:, None]
    n = tl.arange(0, GROUP * BLOCK_C)[None, :]
    tl.store(sums + (tile * (COUNT * BLOCK_C) + k) * (GROUP * BLOCK_C) + n, acc)
