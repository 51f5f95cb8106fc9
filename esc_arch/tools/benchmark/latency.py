"""How long a network takes for one image, and how much memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.float32 import float32_products
from esc_arch.ops.operation import UnusableBackend
from esc_arch.ops.window_attention import WINDOW_ATTENTION

__all__ = ["PRECISIONS", "Latency", "Protocol", "measure"]


@dataclass(frozen=True)
class Precision:
    """What computes in which type: that of autocast, None for float32; whether TF32 may be used for that; in words."""

    autocast: torch.dtype | None
    tf32: bool
    note: str


PRECISIONS = {
    "fp32": Precision(None, False, "fp32: float32, without TF32."),
    "tf32": Precision(None, True, "tf32: float32 with TF32 in convolutions and matrix products."),
    "bf16": Precision(torch.bfloat16, False, "bf16: autocast to bfloat16."),
    "fp16": Precision(torch.float16, False, "fp16: autocast to float16."),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How to measure.

    Args:
        device: cpu or cuda.
        precision: of `PRECISIONS`.
        backend: of window attention in ESC's networks; see `esc_arch.ops.window_attention`.
        runs: how many are timed.
        warmup: how many go before, untimed.

    Raises:
        UserError: there is no such device or backend, or a number is too small.
    """

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
        except ValueError:
            known = ", ".join(WINDOW_ATTENTION.backends)
            raise UserError(f"--backend {self.backend}: not known. Allowed: auto, {known}.") from None

    @property
    def device_name(self) -> str:
        """What is measured, such as the name of the GPU."""
        if self.device == "cuda":
            return str(torch.cuda.get_device_name())
        return f"CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Latency:
    """What was measured.

    Attributes:
        median_ms: milliseconds for one image.
        spread_ms: from the first to the third quartile of the runs; None for fewer than 4.
        memory_mib: the most that PyTorch had allocated on the GPU, in 2^20 bytes, weights included; None on the CPU.
        backend: that window attention took; None where there is none.
    """

    median_ms: float
    spread_ms: float | None
    memory_mib: float | None
    backend: str | None


def measure(net: nn.Module, height: int, width: int, protocol: Protocol) -> Latency | None:
    """Time a network on a random image; None when the GPU's memory does not suffice.

    Each run is waited for. On a GPU the time is that between two events on it.

    Args:
        net: (1, 3, H, W) -> anything; moved to the device, its attention set to the backend.
        height, width: H and W.

    Raises:
        UserError: the backend cannot be used here.
    """
    device = torch.device(protocol.device)
    attentions = [module for module in net.modules() if isinstance(module, WindowAttention)]
    for attention in attentions:
        attention.attn_type = WINDOW_ATTENTION.resolve(protocol.backend)
    image = torch.rand(1, 3, height, width, device=device)
    taken: set[str] = set()
    try:
        net.to(device).eval()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode(), _precision(protocol):
            with _observed_backends(taken):
                net(image)
            for _ in range(protocol.warmup):
                net(image)
            clock = _gpu_milliseconds if device.type == "cuda" else _cpu_milliseconds
            times = [clock(net, image) for _ in range(protocol.runs)]
    except torch.cuda.OutOfMemoryError:
        return None
    except UnusableBackend as error:
        raise UserError(f"--backend {protocol.backend}: {error}") from None
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return Latency(statistics.median(times), _spread(times), memory, ", ".join(sorted(taken)) or None)


def _spread(times: list[float]) -> float | None:
    if len(times) < 4:
        return None
    first, _, third = statistics.quantiles(times, n=4)
    return third - first


def _gpu_milliseconds(net: Callable[[Tensor], object], image: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    net(image)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _cpu_milliseconds(net: Callable[[Tensor], object], image: Tensor) -> float:
    start = time.perf_counter()
    net(image)
    return (time.perf_counter() - start) * 1000


@contextmanager
def _precision(protocol: Protocol) -> Iterator[None]:
    precision = PRECISIONS[protocol.precision]
    autocast: AbstractContextManager[object] = nullcontext()
    if precision.autocast is not None:
        autocast = torch.autocast(protocol.device, precision.autocast)
    with float32_products(tf32=precision.tf32), autocast:
        yield


@contextmanager
def _observed_backends(taken: set[str]) -> Iterator[None]:
    """Note the names of the attention backends that are called."""

    def observing(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: object) -> Tensor:
            taken.add(name)
            return original(*args)

        return forward

    with ExitStack() as stack:
        for name, module in WINDOW_ATTENTION.backends.items():
            for function in ("forward", "layer_forward"):  # the attention alone, and with its projections
                if (original := getattr(module, function, None)) is not None:
                    stack.callback(setattr, module, function, original)
                    setattr(module, function, observing(name, original))
        yield
