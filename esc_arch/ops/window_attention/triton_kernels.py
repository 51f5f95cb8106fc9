"""Kernels of the `triton` backend: attention inside windows, straight from the map of q, k and v to the merged map.

Letters: B batch, C channels, H and W of the map, G windows of a picture, h heads, d head dimension, w side of a window,
N = w^2 tokens, numbered row by row. A tile is a block of tokens by the head dimension, padded to a power of two.

The bias of query (qy, qx) and key (ky, kx) is the table's entry at ky * (2 w - 1) + kx less qy * (2 w - 1) + qx (and a
constant): a number of the key less a number of the query. Where blocks of keys are whole rows of a window, the address
of a score's bias is one of its query plus a constant of the code, and scores that are equally far apart share a load:
for windows of 32 that is under one load and no arithmetic per score, all from a table that the L1 cache holds.

A map is dense, in one of two layouts. Channels last is the faster one: the channels of a pixel are read at once, while
rows of a NCHW map are read pixel by pixel. Sizes of maps are arguments that nothing is specialised on, so that new
sizes compile nothing.

This imports triton: import it only where that is known to be there.
"""

# What Triton compiles are its own types, which annotations cannot say
# mypy: disallow_untyped_defs=False, check_untyped_defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton import Config

from esc_arch.ops.triton_jit import dot, tuned
from esc_arch.ops.triton_support import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRET = tl.constexpr(INTERPRETED)

#: The arguments that decide which configuration is the fastest; sizes of maps are not among them.
_KEY = ["WINDOW", "HEADS", "HEAD_DIM", "CHANNELS_LAST", "PRECISION"]
_SIZES = ["height", "width"]


def _config(queries, keys, warps, stages):
    return Config({"BLOCK_Q": queries, "BLOCK_K": keys}, num_warps=warps, num_stages=stages)


def _fitting(configs, named_args, **arguments):
    """Those whose blocks are not larger than a window needs, and whose tiles the registers can hold."""
    tokens = max(triton.next_power_of_2(arguments["WINDOW"] ** 2), 32)
    words = 2 if arguments["PRECISION"] in ("ieee", "tf32") else 1

    def blocks(config):
        return config.kwargs["BLOCK_Q"], config.kwargs["BLOCK_K"]

    def fits(config):
        return max(blocks(config)) <= tokens and sum(blocks(config)) * arguments["BLOCK_D"] * words <= 24576

    return list(filter(fits, configs)) or [min(configs, key=blocks)]


def _tuned(*configs):
    # (In the interpreter small blocks, so that small windows have several)
    return tuned([_config(*each) for each in configs], interpreted=[_config(32, 32, 1, 1)], key=_KEY, fitting=_fitting)


@triton.jit
def _reflected(index, size):
    """To and fro between 0 and size - 1; see `esc_arch.ops.padding`."""
    period = tl.maximum(2 * size - 2, 1)
    index = index % period
    return tl.minimum(index, period - index)


@triton.jit
def _pixels(token, window, height, width, WINDOW: tl.constexpr):
    """Where tokens of a window of a picture lie: the pixel's number, of the padding the one that it repeats.

    The third result says which tokens are pixels of the map and not of its padding.
    """
    columns = tl.cdiv(width, WINDOW)
    top = window // columns * WINDOW
    left = window % columns * WINDOW
    y = top + token // WINDOW
    x = left + token % WINDOW
    inside = (y < height) & (x < width)
    if top + WINDOW > height:
        y = _reflected(y, height)
    if left + WINDOW > width:
        x = _reflected(x, width)
    return y * width + x, inside


@triton.jit
def _pointers(
    map, picture, channel, pixel, area, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Of a tile in a map of `area` pixels: (tokens, d) where channels are last, else (d, tokens)."""
    d = tl.arange(0, BLOCK_D)
    pixel = pixel.to(tl.int64)
    if CHANNELS_LAST:
        first = map + picture.to(tl.int64) * area * CHANNELS + channel
        return first + pixel[:, None] * CHANNELS + d[None, :]
    else:
        first = map + (picture.to(tl.int64) * CHANNELS + channel) * area
        return first + d[:, None].to(tl.int64) * area + pixel[None, :]


@triton.jit
def _mask(wanted, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    d = tl.arange(0, BLOCK_D) < HEAD_DIM
    if CHANNELS_LAST:
        return wanted[:, None] & d[None, :]
    else:
        return d[:, None] & wanted[None, :]


@triton.jit
def _load(
    map,
    picture,
    channel,
    pixel,
    area,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """A tile (tokens, d); zeros beyond the head dimension."""
    pointers = _pointers(map, picture, channel, pixel, area, CHANNELS, BLOCK_D, CHANNELS_LAST)
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=_mask(pixel >= 0, HEAD_DIM, BLOCK_D, CHANNELS_LAST), other=0.0)
    if CHANNELS_LAST:
        return tile
    else:
        return tl.trans(tile)


@triton.jit
def _store(
    map,
    tile,
    picture,
    channel,
    pixel,
    wanted,
    area,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    pointers = _pointers(map, picture, channel, pixel, area, CHANNELS, BLOCK_D, CHANNELS_LAST)
    tile = tile.to(map.dtype.element_ty)
    if not CHANNELS_LAST:
        tile = tl.trans(tile)
    tl.store(pointers, tile, mask=_mask(wanted, HEAD_DIM, BLOCK_D, CHANNELS_LAST))


@triton.jit
def _tokens(start, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The tokens of a block; in place of those beyond the last one, the last one."""
    token = start + tl.arange(0, BLOCK)
    if WINDOW * WINDOW % BLOCK == 0:
        return token
    else:
        return tl.minimum(token, WINDOW * WINDOW - 1)


@triton.jit
def _place(token, WINDOW: tl.constexpr):
    """The number of a token; the table has the bias of two at the difference of theirs, key less query."""
    return token // WINDOW * (2 * WINDOW - 1) + token % WINDOW


@triton.jit
def _bias(pointers):
    """The table's entries for a tile of scores.

    A load has a layout of its own, from which the numbers would pass through shared memory to that of the scores.
    An instruction that is given as such takes the layout of its users, and so loads them where the scores are.
    """
    if INTERPRET:
        return tl.load(pointers)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _biases(own, start, SIGN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The biases of tokens and a block of others: at `own` plus (or less, by SIGN) the others' places.

    Where blocks are whole rows, or rows whole blocks, differences of places are the same for all blocks: they become
    constants in the addresses of the loads, and no instruction is spent on them.
    """
    if WINDOW * WINDOW % BLOCK == 0 and (WINDOW % BLOCK == 0 or BLOCK % WINDOW == 0):
        own += SIGN * _place(start, WINDOW)
        others = _place(tl.arange(0, BLOCK), WINDOW)
    else:
        others = _place(_tokens(start, BLOCK, WINDOW), WINDOW)
    return _bias(own[:, None] + SIGN * others[None, :])


@triton.jit
def _program(
    table, height, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The block of tokens of a head of a window that a program computes.

    First token, first channel, picture, window of the picture, offset of its statistics, the head's table.
    """
    blocks = tl.cdiv(WINDOW * WINDOW, BLOCK)
    program = tl.program_id(0)
    head = program // blocks % HEADS
    window = program // blocks // HEADS
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    offset = (window.to(tl.int64) * HEADS + head) * (WINDOW * WINDOW)
    table += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    return program % blocks * BLOCK, head * HEAD_DIM, window // windows, window % windows, offset, table


@_tuned((128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (32, 32, 4, 2))
@triton.jit(do_not_specialize=_SIZES)
def attend(
    qkv,
    table,
    out,
    lse,
    height,
    width,
    KEEP_LSE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = softmax(q k^T / sqrt(d) + bias) v; lse, (B * G, h, N), the base-2 logarithm of the softmax's denominator.

    A program is a block of queries of a head of a window.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    first, channel, picture, window, offset, table = _program(table, height, width, BLOCK_Q, WINDOW, HEADS, HEAD_DIM)
    area = height.to(tl.int64) * width

    row = first + tl.arange(0, BLOCK_Q)
    query = _tokens(first, BLOCK_Q, WINDOW)
    q_pixel, inside = _pixels(query, window, height, width, WINDOW)
    wanted = inside & (row < TOKENS)
    q = _load(qkv, picture, channel, q_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    own = table + 2 * WINDOW * (WINDOW - 1) - _place(query, WINDOW)

    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_K):
        k_pixel = _pixels(_tokens(start, BLOCK_K, WINDOW), window, height, width, WINDOW)[0]
        k = _load(qkv, picture, CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        scores = dot(q, tl.trans(k), PRECISION) * HEAD_DIM**-0.5 + _biases(own, start, 1, BLOCK_K, WINDOW)
        if TOKENS % BLOCK_K != 0:
            scores = tl.where((start + tl.arange(0, BLOCK_K))[None, :] < TOKENS, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores * LOG2E - (larger * LOG2E)[:, None])
        shrink = tl.exp2((largest - larger) * LOG2E)
        total = total * shrink + tl.sum(weights, 1)
        largest = larger
        v = _load(qkv, picture, 2 * CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, PRECISION)

    acc = acc / total[:, None]
    _store(out, acc, picture, channel, q_pixel, wanted, area, CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    if KEEP_LSE:
        # In the padding infinity: the weights of its queries, which nobody asked for, are then 0 in every gradient
        log_sum = tl.where(inside, largest * LOG2E + tl.log2(total), float("inf"))
        tl.store(lse + offset + row, log_sum, mask=row < TOKENS)


@_tuned((64, 64, 4, 3), (128, 64, 4, 2), (32, 32, 4, 2))
@triton.jit(do_not_specialize=_SIZES)
def differentiate_queries(
    qkv,
    table,
    out,
    d_out,
    lse,
    products,
    d_qkv,
    height,
    width,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of q, into d_qkv, and products = sum over d of out * d_out, (B * G, h, N), that the others need.

    A program is a block of queries of a head of a window. The padding has no queries, so that nothing is added up.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    first, channel, picture, window, offset, table = _program(table, height, width, BLOCK_Q, WINDOW, HEADS, HEAD_DIM)
    area = height.to(tl.int64) * width

    row = first + tl.arange(0, BLOCK_Q)
    query = _tokens(first, BLOCK_Q, WINDOW)
    q_pixel, inside = _pixels(query, window, height, width, WINDOW)
    wanted = inside & (row < TOKENS)
    q = _load(qkv, picture, channel, q_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    do = _load(d_out, picture, channel, q_pixel, area, CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    o = _load(out, picture, channel, q_pixel, area, CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(products + offset + query, product, mask=row < TOKENS)
    log_sum = tl.load(lse + offset + query)
    own = table + 2 * WINDOW * (WINDOW - 1) - _place(query, WINDOW)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_K):
        k_pixel = _pixels(_tokens(start, BLOCK_K, WINDOW), window, height, width, WINDOW)[0]
        k = _load(qkv, picture, CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        v = _load(qkv, picture, 2 * CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        scores = dot(q, tl.trans(k), PRECISION) * HEAD_DIM**-0.5 + _biases(own, start, 1, BLOCK_K, WINDOW)
        weights = tl.exp2(scores * LOG2E - log_sum[:, None])
        if TOKENS % BLOCK_K != 0:
            weights = tl.where((start + tl.arange(0, BLOCK_K))[None, :] < TOKENS, weights, 0.0)
        d_scores = weights * (dot(do, tl.trans(v), PRECISION) - product[:, None])
        acc += dot(d_scores.to(k.dtype), k, PRECISION)
    acc *= HEAD_DIM**-0.5
    _store(d_qkv, acc, picture, channel, q_pixel, wanted, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)


@_tuned((64, 64, 4, 3), (64, 128, 4, 2), (32, 32, 4, 2))
@triton.jit(do_not_specialize=[*_SIZES, "target_height", "target_width"])
def differentiate_keys(
    qkv,
    table,
    d_out,
    lse,
    products,
    target,
    height,
    width,
    target_height,
    target_width,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of k and v.

    A program is a block of keys of a head of a window. The target is d_qkv where the map consists of whole windows;
    else (PADDED) a padded map of k and v, (B, 2C, target_height, target_width), that is to be folded back.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TARGET_CHANNELS: tl.constexpr = (2 if PADDED else 3) * CHANNELS
    first, channel, picture, window, offset, table = _program(table, height, width, BLOCK_K, WINDOW, HEADS, HEAD_DIM)
    area = height.to(tl.int64) * width

    column = first + tl.arange(0, BLOCK_K)
    key = _tokens(first, BLOCK_K, WINDOW)
    there = column < TOKENS
    k_pixel = _pixels(key, window, height, width, WINDOW)[0]
    k = _load(qkv, picture, CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    v = _load(qkv, picture, 2 * CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    own = table + 2 * WINDOW * (WINDOW - 1) + _place(key, WINDOW)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_Q):
        query = _tokens(start, BLOCK_Q, WINDOW)
        q_pixel = _pixels(query, window, height, width, WINDOW)[0]
        q = _load(qkv, picture, channel, q_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        do = _load(d_out, picture, channel, q_pixel, area, CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
        log_sum = tl.load(lse + offset + query)
        product = tl.load(products + offset + query)
        scores = dot(k, tl.trans(q), PRECISION) * HEAD_DIM**-0.5 + _biases(own, start, -1, BLOCK_Q, WINDOW)
        weights = tl.exp2(scores * LOG2E - log_sum[None, :])
        if TOKENS % BLOCK_Q != 0:
            weights = tl.where((start + tl.arange(0, BLOCK_Q))[None, :] < TOKENS, weights, 0.0)
        dv += dot(weights.to(do.dtype), do, PRECISION)
        d_scores = weights * (dot(v, tl.trans(do), PRECISION) - product[None, :])
        dk += dot(d_scores.to(q.dtype), q, PRECISION)

    pixel = _pixels(key, window, target_height, target_width, WINDOW)[0]
    area = target_height.to(tl.int64) * target_width
    first = channel + (0 if PADDED else CHANNELS)
    dk *= HEAD_DIM**-0.5
    _store(target, dk, picture, first, pixel, there, area, TARGET_CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
    _store(target, dv, picture, first + CHANNELS, pixel, there, area, TARGET_CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)


@triton.jit(do_not_specialize=[*_SIZES, "batch", "share"])
def differentiate_table(
    qkv,
    table,
    d_out,
    lse,
    products,
    sums,
    batch,
    height,
    width,
    share,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the scores, summed over all rows of queries and keys that are equally far apart.

    sums is (shares of the windows, h, 2 w - 1 distances of rows, w queries of a row, w keys of a row); its diagonals
    are what is left to sum. A program takes the rows of keys `near` rows below those of queries, and then those that
    are w - near above: together w pairs of rows in a window whatever `near` is, and all of either with the same biases.
    """
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    SIDE: tl.constexpr = 2 * WINDOW - 1
    blocks: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    q_block = program % blocks
    k_block = program // blocks % blocks
    near = program // (blocks * blocks) % WINDOW
    head = program // (blocks * blocks * WINDOW)
    chunk = tl.program_id(1)
    windows = tl.cdiv(height, WINDOW) * tl.cdiv(width, WINDOW)
    area = height.to(tl.int64) * width
    table += head * SIDE * SIDE
    channel = head * HEAD_DIM

    q_column = q_block * BLOCK + tl.arange(0, BLOCK)
    k_column = k_block * BLOCK + tl.arange(0, BLOCK)
    qx = tl.minimum(q_column, WINDOW - 1)
    kx = tl.minimum(k_column, WINDOW - 1)
    for side in tl.static_range(2):
        distance = near - side * WINDOW
        first_row = side * (WINDOW - near)
        last_row = side * WINDOW + (1 - side) * (WINDOW - near)
        # (No keys are w rows above; there are no rows either, and what is read here is not used)
        place = tl.maximum(distance + WINDOW - 1, 0) * SIDE + WINDOW - 1
        bias = _bias((table + place - qx)[:, None] + kx[None, :])
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for window in range(chunk * share, tl.minimum((chunk + 1) * share, batch * windows)):
            picture = window // windows
            statistics = (head.to(tl.int64) + window * HEADS) * (WINDOW * WINDOW)
            for qy in range(first_row, last_row):
                query = qy * WINDOW + qx
                key = (qy + distance) * WINDOW + kx
                q_pixel = _pixels(query, window % windows, height, width, WINDOW)[0]
                k_pixel = _pixels(key, window % windows, height, width, WINDOW)[0]
                q = _load(qkv, picture, channel, q_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
                do = _load(d_out, picture, channel, q_pixel, area, CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST)
                k = _load(
                    qkv, picture, CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST
                )
                v = _load(
                    qkv, picture, 2 * CHANNELS + channel, k_pixel, area, 3 * CHANNELS, HEAD_DIM, BLOCK_D, CHANNELS_LAST
                )
                log_sum = tl.load(lse + statistics + query)
                product = tl.load(products + statistics + query)
                scores = dot(q, tl.trans(k), PRECISION) * HEAD_DIM**-0.5 + bias
                weights = tl.exp2(scores * LOG2E - log_sum[:, None])
                acc += weights * (dot(do, tl.trans(v), PRECISION) - product[:, None])
        if distance > -WINDOW:
            row = (chunk.to(tl.int64) * HEADS + head) * SIDE + distance + WINDOW - 1
            pointers = sums + row * WINDOW * WINDOW + q_column[:, None] * WINDOW + k_column[None, :]
            tl.store(pointers, acc, mask=(q_column < WINDOW)[:, None] & (k_column < WINDOW)[None, :])
