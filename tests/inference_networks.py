"""Helpers of the tests of inference: small networks ready for use, pictures, and what puts blocks together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import randomise
from torch import Tensor

import esc_arch
from esc_arch.tools.upscale.network import Upscaler

COMMON: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 7,
    "n_blocks": 2,
    "conv_blocks": 2,
    "window_size": 8,
    "num_heads": 2,
}


def upscaler_of(kind: str, *, device: str = "cpu", precision: torch.dtype = torch.float32, **options: Any) -> Upscaler:
    net = getattr(esc_arch, kind)(**{**COMMON, **options})
    randomise(net).eval().requires_grad_(False)
    return Upscaler(net.to(device), {"type": kind}, Path("trial.pth"), torch.device(device), precision)


def picture(height: int, width: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.random((height, width, 3), dtype=np.float32)
    return random.integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype, endpoint=True)


def joined(blocks: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """Blocks of rows of the result, which has this size, put together."""
    blocks = list(blocks)
    assert all((block.dtype, block.device.type) == (torch.float32, "cpu") for block in blocks)
    whole = torch.cat(blocks, dim=1)
    assert whole.shape == (3, *size)
    return whole


def plain(upscaler: Upscaler, image: np.ndarray, scale: float | None = None) -> Tensor:
    """The whole image by `Upscaler` alone."""
    largest = 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max
    x = torch.from_numpy(image.astype(np.float32) / np.float32(largest)).permute(2, 0, 1)[None]
    return upscaler(x, scale)[0]
