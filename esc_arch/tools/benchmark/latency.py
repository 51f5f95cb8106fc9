"""How long a network takes for one image, and how much memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.float32 import float32_products
from esc_arch.ops.operation import UnusableBackend
from esc_arch.ops.window_attention import WINDOW_ATTENTION

__all__ = ["LATENCY_PRECISIONS", "LatencyProtocol", "measure_latency"]

LATENCY_PRECISIONS = {
    "fp32": "float32, without TF32",
    "tf32": "float32 with TF32 in convolutions and matrix products",
    "bf16": "autocast to bfloat16",
    "fp16": "autocast to float16",
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LatencyProtocol:
    """How to measure: on cpu or cuda, after `warmup` untimed runs. UserError if that cannot be done here."""

    device: str
    precision: str = "fp32"
    backend: str = "auto"
    runs: int = 20
    warmup: int = 5

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device here. Give --device cpu, or --no-latency.")
        if self.device == "cpu" and self.precision == "tf32":
            raise UserError("--precision tf32 is for GPUs. Give fp32, bf16 or fp16 with --device cpu.")
        if self.runs < 1 or self.warmup < 0:
            raise UserError(f"--runs {self.runs} --warmup {self.warmup}: at least 1 run, and 0 or more for warm-up.")
        try:
            WINDOW_ATTENTION.resolve(self.backend)
        except ValueError as error:
            raise UserError(f"--backend {self.backend}: {error}") from None

    @property
    def device_name(self) -> str:
        if self.device == "cuda":
            return str(torch.cuda.get_device_name())
        return f"CPU, {torch.get_num_threads()} threads"


def measure_latency(net: nn.Module, height: int, width: int, protocol: LatencyProtocol) -> dict[str, float | str]:
    """Time a network on a random image (1, 3, H, W); it is moved to the device, its attention set to the backend.

    Returns:
        `latency_ms`, the median, or "out of memory"; `latency_spread_ms`, the interquartile range of 4 runs or more;
        on a GPU `memory_mib`, the most that PyTorch allocated, weights included. UserError if the backend cannot run.
    """
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = WINDOW_ATTENTION.resolve(protocol.backend)
    try:
        net.to(protocol.device).eval()
        image = torch.rand(1, 3, height, width, device=protocol.device)
        if image.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        autocast = _AUTOCAST.get(protocol.precision)
        with (
            torch.inference_mode(),
            float32_products(tf32=protocol.precision == "tf32"),
            torch.autocast(protocol.device, autocast, enabled=autocast is not None),
        ):
            times = [_milliseconds(net, image) for _ in range(1 + protocol.warmup + protocol.runs)][-protocol.runs :]
    except torch.cuda.OutOfMemoryError:
        return {"latency_ms": "out of memory"}
    except UnusableBackend as error:
        raise UserError(f"--backend {protocol.backend}: {error}") from None
    measured: dict[str, float | str] = {"latency_ms": statistics.median(times)}
    if len(times) >= 4:
        lower, _, upper = statistics.quantiles(times, n=4)
        measured["latency_spread_ms"] = upper - lower
    if image.is_cuda:
        measured["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return measured


def _milliseconds(net: Callable[[Tensor], object], image: Tensor) -> float:
    start = time.perf_counter()
    net(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000
