"""Flex attention on the kernels of flash-attn 4, where PyTorch and the GPU offer that.

PyTorch calls this backend of its experimental. It has no gradient of a bias, so it is for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esc_arch.ops.compiling import constant_when_compiled
from esc_arch.ops.operation import wants_gradients

from . import flex
from .bias import Bias, parameters_of
from .flash import HALVES, flash_attn_4_suits


def unsupported_reasons(qkv: Tensor, bias: Bias, window: int, heads: int) -> list[str]:
    """Why this backend of flex attention cannot take these inputs."""
    reasons = flex.unsupported_reasons(qkv, bias, window, heads)
    if qkv.device.type != "cuda":
        return [*reasons, f"flex attention's flash backend runs on cuda, not on {qkv.device.type}"]
    if not _offered():
        reasons.append(f"flex attention's flash backend comes with PyTorch 2.10, and this is {torch.__version__}")
    if not flash_attn_4_suits(qkv.device.index):
        reasons.append("it needs flash-attn 4 (`flash_attn.cute`), and a GPU of compute capability 9 to 11")
    if qkv.dtype not in HALVES:
        reasons.append(f"its kernels take bfloat16 and float16, not {qkv.dtype}")
    if wants_gradients(qkv, *parameters_of(bias)):
        reasons.append("it has no gradient of the bias, so it is for inference: `flex` has one")
    return reasons


def forward(qkv: Tensor, bias: Bias, window: int, heads: int) -> Tensor:
    """As `flex`, by other kernels; see `window_attention`."""
    return flex.forward(qkv, bias, window, heads, backend="FLASH")


@constant_when_compiled
def _offered() -> bool:
    from torch.nn.attention import flex_attention

    options = getattr(flex_attention, "FlexKernelOptions", None)
    return "BACKEND" in getattr(options, "__annotations__", {})
