"""Helpers of the tests of inference: small networks ready for use, pictures, and what puts blocks together."""

from __future__ import annotations

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


class Canvas:
    """Puts blocks together; each pixel must come once, in rows of blocks."""

    def __init__(self, height: int, width: int) -> None:
        self.pixels = torch.full((3, height, width), torch.nan)
        self.blocks: list[tuple[int, int, int, int]] = []

    def __call__(self, top: int, left: int, block: Tensor) -> None:
        assert block.dtype == torch.float32
        assert block.device.type == "cpu"
        place = self.pixels[:, top : top + block.shape[1], left : left + block.shape[2]]
        assert place.shape == block.shape
        assert place.isnan().all(), "written twice"
        place.copy_(block)
        self.blocks.append((top, left, *block.shape[1:]))

    def finished(self) -> Tensor:
        assert not self.pixels.isnan().any(), "not all written"
        assert self.blocks == sorted(self.blocks)
        heights: dict[int, set[int]] = {}
        for top, _, height, _ in self.blocks:
            heights.setdefault(top, set()).add(height)
        assert all(len(each) == 1 for each in heights.values())
        return self.pixels


def plain(upscaler: Upscaler, image: np.ndarray, scale: float | None = None) -> Tensor:
    """The whole image by `Upscaler` alone."""
    largest = 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max
    x = torch.from_numpy(image.astype(np.float32) / np.float32(largest)).permute(2, 0, 1)[None]
    return upscaler(x, scale)[0]
