"""Apply cached autotune results of this machine's GPU to `auto`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

from esc_arch.ops.operation import SampleShapes, Size

from .results import MODES, Case, load

__all__ = ["NETWORKS", "Network", "auto_skip_reasons", "nearest"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network(SampleShapes):
    """Shapes of a network that backends are tried with.

    Attributes:
        small: what results are compared on: no multiple of the window, and few enough windows for float64.
        image, patches: what inference and training are timed on. What PyTorch keeps of the scores of all patches for
            their gradients must fit into 4 GB.
    """

    small: Size = (2, 35, 45)
    image: Size = (1, 180, 320)
    patches: Size = (4, 64, 64)


NETWORKS = {
    "ESC": Network(),
    "ESC-XL": Network(192, 12, 48, 48, 13, 240, small=(1, 41, 30), image=(1, 96, 144), patches=(1, 96, 96)),
}


def nearest(*, channels: int = 0, pdim: int = 0) -> str:
    """The network of `NETWORKS` nearest to one with these channels, or these channels that ConvAttn convolves."""
    # (Compared with numbers only, so that torch.compile can trace it, where these may be symbols)
    return "ESC" if channels <= 128 and pdim <= 32 else "ESC-XL"


@torch.compiler.assume_constant_result
def auto_skip_reasons(
    operation: str, network: str, dtype: torch.dtype, tf32: bool, training: bool, device: str, index: int | None
) -> list[str]:
    """Why `auto` does not take the Triton kernels of an operation; empty where they were found exact and faster.

    Args:
        operation, network: names, see `Case`.
        dtype, tf32: of the numbers, and if those of float32 are multiplied as TF32.
        device, index: type and number of the device that the inputs are on.
    """
    if device == "cpu":
        return ["on a CPU its kernels are interpreted, for tests alone"]
    switch = os.environ.get("ESC_ARCH_TRITON")
    if switch == "1":
        return []
    if switch == "0":
        return ["ESC_ARCH_TRITON=0 keeps auto from it"]
    precision = "tf32" if tf32 and dtype is torch.float32 else str(dtype).removeprefix("torch.")
    results = load(device, index)
    result = results.get(Case(operation, "triton", network, precision, MODES[training]))
    if result is None:
        if not results:
            _advise()
        return ["not tried on this GPU yet: `basicsr warmup` tries it"]
    if result.failure:
        return [f"failed its trial on this GPU: {result.failure}; `basicsr warmup --again` tries it again"]
    return [result.slower] if result.slower else []


@cache
def _advise() -> None:
    """Once in a process."""
    logger.info("There are faster kernels for this GPU, not tried on it yet: `basicsr warmup` tries them.")
