"""Latency: how often, with what and in which precision a network is run. No time is asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esc_arch.archs import ESC
from esc_arch.errors import UserError
from esc_arch.ops.window_attention import reference as naive
from esc_arch.ops.window_attention import sdpa
from esc_arch.tools.benchmark.latency import LATENCY_PRECISIONS, LatencyProtocol, measure_latency

SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 2,
}


class Watched(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        out = self.conv(x)
        self.calls.append((tuple(x.shape), out.dtype, *tf32, torch.is_grad_enabled(), self.training))
        return out


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_runs(precision: str, dtype: torch.dtype) -> None:
    net = Watched()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    latency = measure_latency(net, 6, 4, LatencyProtocol(device="cpu", precision=precision, runs=5, warmup=2))
    assert net.calls == [((1, 3, 6, 4), dtype, "highest", False, False, False)] * 8
    assert latency.keys() == {"latency_ms", "latency_spread_ms"}
    assert all(float(value) >= 0 for value in latency.values())
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_median_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 5.0, 1.0, 2.0, 100.0, 3.0])
    monkeypatch.setattr("esc_arch.tools.benchmark.latency._milliseconds", lambda net, image: next(times))
    latency = measure_latency(Watched(), 4, 4, LatencyProtocol(device="cpu", runs=5, warmup=0))
    assert latency == {"latency_ms": 3.0, "latency_spread_ms": 51.0}


def test_too_few_runs_for_quartiles() -> None:
    latency = measure_latency(Watched(), 4, 4, LatencyProtocol(device="cpu", runs=3, warmup=0))
    assert "latency_spread_ms" not in latency


@pytest.mark.parametrize("backend", ["naive", "SDPA"])
def test_the_backend_is_used(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, module = [], {"naive": naive, "SDPA": sdpa}[backend]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: calls.append(args) or forward(*args))
    measure_latency(ESC(**SMALL), 6, 5, LatencyProtocol(device="cpu", backend=backend, runs=1, warmup=0))
    assert len(calls) == 2


def test_backend_of_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "unsupported_reasons", lambda *_: ["it is broken"], raising=False)
    with pytest.raises(UserError, match=r"--backend naive: attn_type naive cannot run here\. naive: it is broken"):
        measure_latency(ESC(**SMALL), 6, 5, LatencyProtocol(device="cpu", backend="naive"))


def test_other_faults_are_not_the_users() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        measure_latency(nn.Conv2d(4, 3, 1), 6, 5, LatencyProtocol(device="cpu"))


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    net = Watched()
    monkeypatch.setattr(net, "forward", fail)
    assert measure_latency(net, 6, 5, LatencyProtocol(device="cpu")) == {"latency_ms": "out of memory"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", LATENCY_PRECISIONS)
def test_on_a_gpu(precision: str) -> None:
    net = ESC(**SMALL)
    latency = measure_latency(net, 40, 30, LatencyProtocol(device="cuda", precision=precision, runs=4))
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    assert float(latency["memory_mib"]) > weights / 2**20
    assert float(latency["latency_ms"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device here. Give --device cpu, or --no-latency."),
        ({"precision": "tf32"}, "--precision tf32 is for GPUs. Give fp32, bf16 or fp16 with --device cpu."),
        ({"runs": 0}, "--runs 0 --warmup 5: at least 1 run, and 0 or more for warm-up."),
        ({"warmup": -1}, "--runs 20 --warmup -1: at least 1 run"),
        ({"backend": "fast"}, "--backend fast: attn_type 'fast' is not known; allowed: auto, naive, sdpa, flex"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        LatencyProtocol(**{"device": "cpu", **options})
    assert str(caught.value).startswith(message)
