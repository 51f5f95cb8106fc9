"""Compiled flex attention: the bias is read from its table inside the kernel, no (G * B, h, N, N) is stored.

This is what the paper trains with. It is compiled once per process for a combination of window, heads, type and
device, and serves every image size: the number of windows is marked as varying.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.operation import wants_gradients

from .bias import Bias, dense_bias, parameters_of, relative_index
from .windows import merge_windows, pad_to_windows, split_windows


def unsupported_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why flex attention cannot take these inputs."""
    reasons = []
    head_dim = qkv.shape[1] // (3 * heads)
    if qkv.device.type not in ("cpu", "cuda"):
        reasons.append(f"it runs on cpu and cuda, not on {qkv.device.type}")
    if qkv.device.type == "cpu":
        if wants_gradients(qkv, *parameters_of(bias)):
            reasons.append("PyTorch's flex attention has no backward pass on the CPU")
        # (A compiler at work cannot trace the search, and is itself the proof that there is one)
        if not torch.compiler.is_compiling() and not any(
            map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))
        ):
            reasons.append(
                "compiling it for the CPU needs a C++ compiler, and there is no g++, clang++ or cl on the PATH"
            )
    if torch.compiler.is_exporting():
        reasons.append("a compiled kernel cannot be exported")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"its kernels take float32, bfloat16 and float16, not {qkv.dtype}")
    if qkv.device.type == "cuda" and head_dim < 16:
        reasons.append(f"its GPU kernel needs a head dimension of 16 or more, not {head_dim}")
    return reasons


def forward(qkv: Tensor, bias: Bias, window: int, heads: int, backend: str | None = None) -> Tensor:
    """Flex attention with a score modification that reads the bias; see `window_attention`.

    Args:
        backend: of flex attention's own (`BACKEND` of its kernel options); None for its choice.
    """
    q, k, v = split_windows(pad_to_windows(qkv, window), window, heads)
    if torch.compiler.is_compiling():
        out = _attend(q, k, v, bias, window, backend)  # the compiler that is at work already takes it in
    else:
        # One layout, or each would be compiled again: for exact sizes the windows are views of the projection
        q, k, v = (part.clone(memory_format=torch.contiguous_format) for part in (q, k, v))
        for part in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(part, 0)
        out = _compiled()(q, k, v, bias, window, backend)
    return merge_windows(out, window, *qkv.shape[-2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Bias, window: int, backend: str | None) -> Tensor:
    # The bias is an argument, never kept in a closure: a copied or newly loaded network has another one
    from torch.nn.attention.flex_attention import flex_attention

    if isinstance(bias, Tensor):

        def add_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + bias[h, relative_index(q_idx, kv_idx, window)]
    else:
        dense = dense_bias(bias, window)

        def add_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + dense[h, q_idx, kv_idx]

    options: Any = None if backend is None else {"BACKEND": backend}
    out = flex_attention(q, k, v, score_mod=add_bias, kernel_options=options)
    assert isinstance(out, Tensor)  # other results come only when asked for
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attend)
