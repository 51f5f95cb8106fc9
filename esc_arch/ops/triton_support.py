"""What the backends in Triton kernels have in common: where they run, and how they multiply. Does not import triton."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from esc_arch.ops.compiling import constant_when_compiled

__all__ = ["INTERPRETED", "missing", "precision", "unsupported_reasons"]

#: True if Triton runs kernels in its interpreter, on the CPU: slow, to check their arithmetic.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def unsupported_reasons(x: Tensor) -> list[str]:
    """What is against kernels for a map, wherever they are used."""
    lacking = missing(x.device.type, x.device.index)
    reasons = [lacking] if lacking else []
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        reasons.append("a compiled kernel cannot be exported")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"its kernels take float32, bfloat16 and float16, not {x.dtype}")
    return reasons


@constant_when_compiled
def missing(device: str, index: int | None) -> str:
    """What this machine lacks; empty when nothing. Constant under torch.compile.

    Args:
        device, index: type and number of the device that the inputs are on.
    """
    if not _installed():
        return "triton is not installed"
    if device == "cpu":
        import triton

        interpreted = hasattr(triton, "knobs") and triton.knobs.runtime.interpret
        return "" if interpreted else "it runs on GPUs (on a CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
    if device != "cuda" or torch.version.hip:
        return "it runs on GPUs of NVIDIA"
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"its kernels need a GPU of compute capability 8.0 or newer, not {major}.{minor}"


def precision(x: Tensor, tf32: bool) -> str:
    """How kernels multiply numbers of the type of `x`; `tf32`: float32 may lose all but ten bits of its fraction."""
    if x.dtype is not torch.float32:
        return "half" if x.is_cuda else "widened"
    return "tf32" if tf32 else "ieee"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
