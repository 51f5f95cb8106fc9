"""Window attention in C++ for the CPU: reads the projection where it lies, padding included, and keeps scores in cache.

Computes in float32; half-precision maps are converted on the way in and out. See `esc_arch.ops.cpu` for when it
is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esc_arch.ops import cpu
from esc_arch.ops.cpu import register
from esc_arch.ops.layout import empty_like, empty_map

from .bias import Bias, parameters_of

#: A window's keys, values and gradients are held by each thread: some megabytes here, and no longer in the cache.
LARGEST_WINDOW = 96


def unsupported_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why the C++ operators cannot take these inputs."""
    reasons = cpu.unsupported_reasons()
    if qkv.device.type != "cpu":
        reasons.append(f"it runs on cpu, not on {qkv.device.type}")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"it takes float32, bfloat16 and float16, not {qkv.dtype}")
    if window > LARGEST_WINDOW:
        reasons.append(f"it takes windows up to {LARGEST_WINDOW}, not {window}")
    if torch.compiler.is_exporting():
        reasons.append("an operator that this machine compiled cannot be exported")
    return reasons


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """The C++ operator; see `window_attention`."""
    first, second = operands(bias)
    out, _ = torch.ops.esc_arch.window_attention_cpu(qkv.float(), first, second, window, heads)
    return out.to(qkv.dtype)


def operands(bias: Bias) -> tuple[Tensor, Tensor | None]:
    """The table and None, or the factors of queries and keys, as the operators take them."""
    first, *others = (part.float().contiguous() for part in parameters_of(bias))
    return first, others[0] if others else None


def _fake_forward(
    qkv: Tensor, bias: Tensor, key_factors: Tensor | None, window: int, heads: int
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = qkv.shape
    windows = batch * -(-height // window) * -(-width // window)
    return empty_like(qkv, channels // 3), qkv.new_empty((2, heads, windows, window**2))


def _fake_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, key_factors: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_keys = qkv.new_empty(0) if key_factors is None else torch.empty_like(key_factors)
    return empty_like(qkv), torch.empty_like(bias), of_keys


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, key_factors, ctx.window, ctx.heads = inputs
    ctx.save_for_backward(qkv, bias, key_factors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, bias, key_factors, out, statistics = ctx.saved_tensors
    of_qkv, of_bias, of_keys = torch.ops.esc_arch.window_attention_backward_cpu(
        grad, qkv, bias, key_factors, out, statistics, ctx.window, ctx.heads
    )
    return of_qkv, of_bias, of_keys, None, None


register("window_attention_fused_cpu", lambda x, *others: empty_map(x))
register("window_attention_cpu", _fake_forward, _backward, _save)
register("window_attention_backward_cpu", _fake_backward)
