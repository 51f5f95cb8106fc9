"""The flash backend: biases as further dimensions of queries and keys, and which kernel is called with what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DEVICES, SIZES, attention_rounding, max_error, needs_cuda, normal
from torch import Tensor

from esc_arch.ops.window_attention import WINDOW_ATTENTION, flash, window_attention

HEADS = 2
Factors = tuple[Tensor, Tensor]


def inputs(
    batch: int,
    height: int,
    width: int,
    *,
    window: int = 8,
    head_dim: int = 16,
    rank: int = 6,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Factors]:
    """A projection, and factors whose products are of the size of the scores."""
    qkv = normal(batch, 3 * HEADS * head_dim, height, width, seed=height * 100 + width, dtype=dtype)
    factors = [normal(HEADS, window**2, rank, seed=seed) for seed in (1, 2)]
    return qkv, (factors[0] * rank**-0.5, factors[1])


def attend(qkv: Tensor, bias: Tensor | Factors, backend: str = "flash", window: int = 8) -> Tensor:
    return window_attention(qkv, bias, window=window, heads=HEADS, backend=backend)


def results(qkv: Tensor, factors: Factors, backend: str) -> list[Tensor]:
    """The merged map and the gradients of the projection and both factors."""
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, *factors)]
    out = attend(leaves[0], (leaves[1], leaves[2]), backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent_of(out))]


def cotangent_of(out: Tensor) -> Tensor:
    return normal(*out.shape, seed=9).to(out.device, out.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_reference(dtype: torch.dtype, device: str) -> None:
    """At most twice the error of a dense bias, the factors being in the type of the projection for both, and rounding.

    (Sums are in float32, whatever the type.)
    """
    for size in SIZES:
        qkv, factors = inputs(2, *size, dtype=dtype)
        factors = (factors[0].to(dtype), factors[1].to(dtype))
        exact = results(qkv.double(), (factors[0].double(), factors[1].double()), "naive")
        qkv, factors = qkv.to(device), (factors[0].to(device), factors[1].to(device))
        plain, fast = (results(qkv, factors, backend) for backend in ("naive", "flash"))
        roundings = [0.0, *attention_rounding(qkv, factors, cotangent_of(exact[0]), 8, HEADS)]
        for expected, reference, actual, rounding in zip(exact, plain, fast, roundings, strict=True):
            rounding += 4 * torch.finfo(dtype).eps * expected.abs().max().item()
            assert max_error(actual, expected) <= 2 * max_error(reference, expected) + rounding, size
            assert actual.dtype == dtype


def test_gradients_to_all_inputs() -> None:
    qkv, factors = inputs(1, 3, 5, window=3, head_dim=2, rank=3, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (qkv, *factors)]
    assert torch.autograd.gradcheck(lambda qkv, q, k: attend(qkv, (q, k), window=3), leaves)


def test_factors_in_float32_under_autocast() -> None:
    qkv, factors = inputs(1, 11, 9)
    expected = attend(qkv.bfloat16().double(), (factors[0].double(), factors[1].double()), "naive")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(qkv.bfloat16(), factors)
    assert out.dtype == torch.bfloat16
    assert max_error(out, expected) < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_without_a_graph_break(device: str) -> None:
    qkv, factors = inputs(1, 11, 9, dtype=torch.float32 if device == "cpu" else torch.float16)
    qkv, factors = qkv.to(device), (factors[0].to(device), factors[1].to(device))
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert max_error(compiled(qkv, factors), attend(qkv, factors)) < 1e-2


def test_auto_takes_flash_for_factors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the C++ operator is not available, which takes both."""
    monkeypatch.setattr(WINDOW_ATTENTION.backends["cpu"], "unsupported_reasons", lambda *_: ["not built"])
    called = []
    monkeypatch.setattr(flash, "forward", lambda *_: called.append("flash") or torch.zeros(1))
    qkv, factors = inputs(1, 8, 8)
    attend(qkv, factors, "auto")
    assert called == ["flash"]
    attend(qkv, normal(HEADS, 15**2), "auto")
    assert called == ["flash"]


# --- which kernel --------------------------------------------------------------------------------------------------


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, h, d), without a scale."""
    return ((q.transpose(1, 2) @ k.transpose(1, 2).mT).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


class Stub:
    """Stands for `flash_attn_func`: keeps what it was called with."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.calls: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, None]:
        self.calls.append(([tuple(x.shape) for x in (q, k, v)], options))
        out = plain_attention(q, k, v)
        return (out, None) if self.version == 4 else out


@pytest.fixture
def on_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if tensors of the CPU were on a GPU that has flash kernels."""
    monkeypatch.setattr(flash, "_on_flash", lambda x: True)
    monkeypatch.setattr(flash, "_capability", lambda device: (9, 0))
    flash._package.cache_clear()
    yield
    flash._package.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> Stub:
    """Modules of these names that can be imported; the last one has the function."""
    stub = Stub(4 if names[-1] == "flash_attn.cute" else 2)
    for name in names:
        module = ModuleType(name)
        monkeypatch.setattr(module, "flash_attn_func", stub, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash, "_installed", lambda name: name in names)
    return stub


@pytest.mark.parametrize(
    ("modules", "value_dim"),
    [(("flash_attn", "flash_attn_2_cuda"), 22), (("flash_attn", "flash_attn.cute"), 16)],
    ids=["flash-attn 2", "flash-attn 4"],
)
def test_what_a_package_is_called_with(
    modules: tuple[str, ...], value_dim: int, on_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(windows, tokens, heads, dimensions) and a scale of 1; version 2 wants values as wide as keys."""
    stub = install(monkeypatch, *modules)
    qkv, factors = inputs(1, 20, 11)
    out = attend(qkv, factors)
    assert stub.calls == [([(6, 64, HEADS, 22), (6, 64, HEADS, 22), (6, 64, HEADS, value_dim)], {"softmax_scale": 1.0})]
    assert max_error(out, attend(qkv, factors, "naive")) < 1e-5


def test_version_4_is_for_the_gpus_it_has_kernels_for(on_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", "flash_attn_2_cuda", "flash_attn.cute")
    assert [flash._package(capability)[1] for capability in [(8, 0), (9, 0), (10, 0), (12, 0)]] == [
        False,
        True,
        True,
        False,
    ]


def test_pytorchs_flash_kernel_without_a_package(on_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        calls.append((v.shape[-1], options, *enabled))
        return plain_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(flash, "_installed", lambda name: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    qkv, factors = inputs(1, 8, 8)
    out = attend(qkv, factors)
    assert calls == [(22, {"scale": 1.0}, True, False)]
    assert max_error(out, attend(qkv, factors, "naive")) < 1e-5


def test_a_package_that_is_not_there() -> None:
    assert not flash._installed("no_such_package.module")
    assert not flash._installed("no_such_package")
    assert flash._installed("torch.nn")


def test_the_cpu_takes_its_flash_kernel() -> None:
    """It wants values as wide as keys; narrower ones go to a kernel that stores all scores."""
    qkv, factors = inputs(1, 8, 8)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(qkv, factors)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


# --- reasons -------------------------------------------------------------------------------------------------------


def test_a_table_has_no_factors() -> None:
    qkv, _ = inputs(1, 8, 8)
    with pytest.raises(RuntimeError) as info:
        attend(qkv, normal(HEADS, 15**2))
    message = str(info.value)
    assert "attn_type flash cannot run here" in message
    assert "a table of free biases has no such form without an error" in message
    assert "basicsr convert --flashbias-rank 48" in message
    assert "options/train_ESC_FlashBias_x2.yml" in message


def test_too_wide(on_flash: None) -> None:
    qkv, factors = inputs(1, 8, 8, head_dim=128, rank=130)
    with pytest.raises(RuntimeError, match=r"take head dimension \+ rank of up to 256, not 258"):
        attend(qkv, factors)


def test_an_old_gpu(on_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_capability", lambda device: (7, 5))
    qkv, factors = inputs(1, 8, 8)
    with pytest.raises(RuntimeError, match=r"need a GPU of compute capability 8\.0 or newer, not 7\.5"):
        attend(qkv, factors)


@needs_cuda
def test_kernels_on_a_gpu() -> None:
    """In half precision a flash kernel, in float32 one that takes narrower values as they are."""
    qkv, factors = inputs(1, 20, 27)
    factors = (factors[0].cuda(), factors[1].cuda())
    for dtype, kernel in [(torch.float16, "flash"), (torch.float32, "efficient")]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            attend(qkv.to("cuda", dtype), factors)
        assert any(kernel in event.key for event in profile.key_averages()), dtype
