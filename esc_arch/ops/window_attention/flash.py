"""Flash attention kernels for biases that are a product of two factors (RIB and FlashBias, arXiv 2603.06738).

The factors are more dimensions of the queries and keys: softmax([q / sqrt(d), q_factors] [k, k_factors]^T) v. So
kernels that know of no bias compute it exactly, and no (h, N, N) tensor is needed. They are, in float16 and bfloat16
on a GPU: flash-attn 4 (`flash_attn.cute`, compute capability 9 to 11) or else flash-attn 2 where it is installed,
otherwise, and under torch.compile, PyTorch's own; anywhere else what `F.scaled_dot_product_attention` chooses, which
is its flash kernel on a CPU.

The values are narrower than the keys then. flash-attn 4 and PyTorch's memory-efficient kernel (float32 on a GPU) take
them so; the others want equal widths, so that zeros are appended and cut off again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from esc_arch.ops.compiling import constant_when_compiled

from .bias import Bias
from .windows import merge_windows, pad_to_windows, split_windows

#: The widest queries and keys that flash kernels of all kinds take.
MAX_WIDTH = 256
HALVES = (torch.float16, torch.bfloat16)


def unsupported_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why flash kernels cannot take these inputs."""
    if isinstance(bias, Tensor):
        return [
            "flash kernels take biases that are a product of two factors (attn_type RIB or FlashBias); a table of free "
            "biases has no such form without an error: `basicsr convert --flashbias-rank 48` makes factors that come "
            "close, and options/train_ESC_FlashBias_x2.yml trains them further"
        ]
    reasons = []
    width = qkv.shape[1] // (3 * heads) + bias[0].shape[-1]
    if _on_flash(qkv):
        if width > MAX_WIDTH:
            reasons.append(f"flash kernels take head dimension + rank of up to {MAX_WIDTH}, not {width}")
        capability = _capability(qkv.device.index)
        if capability < (8, 0):
            reasons.append(
                "flash kernels need a GPU of compute capability 8.0 or newer, not " + ".".join(map(str, capability))
            )
    return reasons


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + q_factors k_factors^T) v in each window; see `window_attention`."""
    q, k, v = split_windows(pad_to_windows(qkv, window), window, heads)
    q_factors, k_factors = (part.to(q.dtype).expand(q.shape[0], -1, -1, -1) for part in bias)
    q = torch.cat([q * q.shape[-1] ** -0.5, q_factors], dim=-1)
    k = torch.cat([k, k_factors], dim=-1)
    return merge_windows(_attend(q, k, v), window, *qkv.shape[-2:])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v; q and k (B * G, h, N, d + r), v (B * G, h, N, d)."""
    if not _on_flash(q):
        narrow = q.is_cuda  # there are kernels for that; on a CPU only the one that stores all scores
        return F.scaled_dot_product_attention(q, k, v if narrow else _widened(v, q), scale=1.0)[..., : v.shape[-1]]
    attend, takes_narrow = (None, False) if torch.compiler.is_compiling() else _package(_capability(q.device.index))
    values = v if takes_narrow else _widened(v, q)
    if attend is None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, values, scale=1.0)
    else:
        # These packages have tokens before heads; version 4 returns the log-sum-exp too
        result = attend(*(x.transpose(1, 2) for x in (q, k, values)), softmax_scale=1.0)
        out = (result[0] if isinstance(result, tuple) else result).transpose(1, 2)
    return out[..., : v.shape[-1]]


def _widened(v: Tensor, q: Tensor) -> Tensor:
    return F.pad(v, (0, q.shape[-1] - v.shape[-1]))


def _on_flash(x: Tensor) -> bool:
    """True if flash kernels must be selected explicitly."""
    return x.is_cuda and x.dtype in HALVES


@constant_when_compiled
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@constant_when_compiled
def flash_attn_4_suits(device: int | None) -> bool:
    """True if flash-attn 4 is installed and supports this GPU."""
    return 9 <= _capability(device)[0] <= 11 and _installed("flash_attn.cute")


@cache
def _package(capability: tuple[int, int]) -> tuple[Callable[..., Any] | None, bool]:
    """The attention of a flash-attn that is installed and suits the GPU, and whether it takes narrower values."""
    if 9 <= capability[0] <= 11 and _installed("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func as attend_4

        return attend_4, True
    if _installed("flash_attn") and _installed("flash_attn_2_cuda"):
        from flash_attn import flash_attn_func as attend_2

        return attend_2, False
    return None, False


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package that it would be in
        return False
