"""Window attention in Triton kernels: from the projection to the merged map without a copy or a score in memory.

q, k and v are read where the projection left them, the padding by computing which pixel it repeats, and the bias from
its table, so that besides the result only one number per token and head is written, and only for a later gradient.
Every gradient is a sum in a fixed order: repeated runs are equal to the last bit, whatever
`torch.use_deterministic_algorithms` says. A map that is dense in channels-last layout is the fastest to read; NCHW
works too, and any other layout is copied to NCHW first.

The first call for a combination of type, head dimension, heads, window and layout compiles up to four variants of each
kernel and measures which is the fastest: 5 to 15 seconds for inference, 10 to 30 more at the first gradient (float32
without TF32 takes longest). What was compiled stays in Triton's cache on disk. New sizes of images compile nothing.

Inside a CUDA graph that choice cannot be made: call once before capturing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.ops import triton_support
from esc_arch.ops.autotune import results
from esc_arch.ops.float32 import tf32_in_products
from esc_arch.ops.layout import dense_layout
from esc_arch.ops.operation import wants_gradients
from esc_arch.ops.triton_support import precision

from .bias import Bias

#: Of a head: what the registers of a multiprocessor hold.
MAX_HEAD_DIM = 128
#: Programs that share the windows when the table's gradient is summed: enough to keep every GPU busy to the end.
PROGRAMS = 4096


def unsupported_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why these kernels cannot take these inputs."""
    head_dim = qkv.shape[1] // (3 * heads)
    reasons = triton_support.unsupported_reasons(qkv)
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"its kernels take a head dimension of up to {MAX_HEAD_DIM}, not {head_dim}")
    if not isinstance(bias, Tensor):
        reasons.append("its kernels read a table of biases, not factors: attn_type flash is made for these")
    return reasons


def auto_skip_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why `auto` leaves these kernels to those who ask for them by name."""
    assert isinstance(bias, Tensor)  # others are refused above
    network, training = results.nearest(channels=qkv.shape[1] // 3), wants_gradients(qkv, bias)
    where = qkv.device.type, qkv.device.index
    return results.auto_skip_reasons("window attention", network, qkv.dtype, tf32_in_products(), training, *where)


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v in each window; see `window_attention`."""
    assert isinstance(bias, Tensor)  # others are refused above
    keep = wants_gradients(qkv, bias)
    out, _ = _attend(qkv, bias, window, heads, keep)
    return out


@torch.library.custom_op("esc_arch::window_attention_triton", mutates_args=())
def _attend(qkv: Tensor, table: Tensor, window: int, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    """The merged map, (B, C, H, W), and, to keep for the gradient, the log-sum-exps, (B * G, h, N)."""
    from .triton_kernels import attend

    qkv, table = _dense(qkv), table.float().contiguous()
    out, lse = _results(qkv, table, window, heads, keep)
    with torch.cuda.device_of(qkv):
        attend[_grid(qkv, window, heads, "BLOCK_Q")](
            qkv, table, out, lse, *qkv.shape[-2:], KEEP_LSE=keep, **_constants(qkv, window, heads)
        )
    return out, lse


def _results(qkv: Tensor, table: Tensor, window: int, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = qkv.shape
    out = _empty(qkv, batch, channels // 3, height, width)
    shape = (_count(qkv, window), heads, window**2) if keep else (0,)
    return out, qkv.new_empty(shape, dtype=torch.float32)


_attend.register_fake(_results)


@torch.library.custom_op("esc_arch::window_attention_backward_triton", mutates_args=())
def _differentiate(
    qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, window: int, heads: int
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv, in its shape, and of the table, float32."""
    from .triton_kernels import differentiate_keys, differentiate_queries

    qkv, table = _dense(qkv), table.float().contiguous()
    out, d_out = (x.contiguous(memory_format=dense_layout(qkv)) for x in (out, d_out))
    height, width = qkv.shape[-2:]
    constants = _constants(qkv, window, heads)
    d_qkv, products = _empty(qkv, *qkv.shape), torch.empty_like(lse)
    padded_height, padded_width = (math.ceil(size / window) * window for size in (height, width))
    padded = (padded_height, padded_width) != (height, width)
    target = d_qkv
    if padded:
        target = _empty(qkv, qkv.shape[0], qkv.shape[1] // 3 * 2, padded_height, padded_width)
    with torch.cuda.device_of(qkv):
        differentiate_queries[_grid(qkv, window, heads, "BLOCK_Q")](
            qkv, table, out, d_out, lse, products, d_qkv, height, width, **constants
        )
        differentiate_keys[_grid(qkv, window, heads, "BLOCK_K")](
            qkv, table, d_out, lse, products, target, height, width, *target.shape[-2:], PADDED=padded, **constants
        )
        d_table = _differentiate_table(qkv, table, d_out, lse, products, window, heads)
    if padded:
        d_qkv[:, qkv.shape[1] // 3 :] = _fold(_fold(target, height, 2), width, 3)
    return d_qkv, d_table


@_differentiate.register_fake
def _(qkv: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty(qkv, *qkv.shape), torch.empty_like(table, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, ctx.window, ctx.heads, _ = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, out, lse = ctx.saved_tensors
    d_qkv, d_table = _differentiate(qkv, table, out, lse, d_out, ctx.window, ctx.heads)
    return d_qkv, d_table.to(table.dtype), None, None, None


_attend.register_autograd(_backward, setup_context=_keep)


def _differentiate_table(
    qkv: Tensor, table: Tensor, d_out: Tensor, lse: Tensor, products: Tensor, window: int, heads: int
) -> Tensor:
    from .triton_kernels import differentiate_table

    windows = _count(qkv, window)
    block = 32 if math.ceil(window / 32) * 32 <= math.ceil(window / 16) * 16 else 16
    programs = heads * window * math.ceil(window / block) ** 2
    share = math.ceil(windows / min(math.ceil(PROGRAMS / programs), windows))
    sums = table.new_empty(math.ceil(windows / share), heads, 2 * window - 1, window, window)
    constants = _constants(qkv, window, heads)
    stages = 3 if constants["BLOCK_D"] <= 64 else 2  # what the shared memory of smaller GPUs holds
    constants |= {"BLOCK": block, "num_warps": 2, "num_stages": stages}
    batch, _, *sizes = qkv.shape
    differentiate_table[(programs, sums.shape[0])](
        qkv, table, d_out, lse, products, sums, batch, *sizes, share, **constants
    )
    return _sum_diagonals(sums.sum(0)).flatten(1)


def _sum_diagonals(x: Tensor) -> Tensor:
    """(..., w, w) -> (..., 2 w - 1): the sum of x[i, j] over equal j - i, from 1 - w to w - 1."""
    window = x.shape[-1]
    # A row of 2 w numbers, read as rows of 2 w - 1, begins one place later in each: diagonals become columns
    skewed = F.pad(x.flip(-2), (0, window)).flatten(-2)[..., : window * (2 * window - 1)]
    return skewed.unflatten(-1, (window, 2 * window - 1)).sum(-2)


def _fold(x: Tensor, size: int, dim: int) -> Tensor:
    """The gradient of padding by reflection at the end of `dim`: what the padding got goes to the pixels it repeats."""
    if size == 1:
        return x.sum(dim, keepdim=True)
    folded = x.narrow(dim, 0, size).clone(memory_format=torch.preserve_format)
    backwards = True
    for start in range(size, x.shape[dim], size - 1):
        part = x.narrow(dim, start, min(size - 1, x.shape[dim] - start))
        length = part.shape[dim]
        if backwards:
            folded.narrow(dim, size - 1 - length, length).add_(part.flip(dim))
        else:
            folded.narrow(dim, 1, length).add_(part)
        backwards = not backwards
    return folded


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=dense_layout(x))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=dense_layout(like))


def _count(qkv: Tensor, window: int) -> int:
    """Windows of a batch."""
    batch, _, height, width = qkv.shape
    return batch * ((height + window - 1) // window) * ((width + window - 1) // window)


def _grid(qkv: Tensor, window: int, heads: int, block: str) -> Callable[[dict[str, Any]], tuple[int]]:
    """A program for each block of tokens of each head of each window."""
    count = _count(qkv, window) * heads
    return lambda meta: (count * math.ceil(window**2 / meta[block]),)


def _constants(qkv: Tensor, window: int, heads: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    head_dim = qkv.shape[1] // (3 * heads)
    return {
        "WINDOW": window,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "CHANNELS_LAST": dense_layout(qkv) is torch.channels_last,
        "PRECISION": precision(qkv, tf32_in_products()),
        # Explicit: Triton's default is changing
        "enable_fp_fusion": True,
    }
