"""Window attention: padding, windows, the bias, and every backend against loops over windows in float64."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from networks import (
    BACKENDS,
    DEVICES,
    SIZES,
    TRAINABLE,
    loop_attention,
    loop_bias,
    max_error,
    needs_compiler,
    needs_cuda,
    normal,
    reflected_indices,
)
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.ops.operation import UnusableBackend
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.ops.window_attention import WINDOW_ATTENTION, dense_bias, window_attention
from esc_arch.ops.window_attention.bias import relative_index
from esc_arch.ops.window_attention.windows import merge_windows, split_windows

HEADS = 2
HALVES = [torch.bfloat16, torch.float16]


def inputs(
    batch: int, height: int, width: int, *, window: int, head_dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """qkv and table, such that the weights of the attention are neither flat nor all on one token."""
    qkv = normal(batch, 3 * HEADS * head_dim, height, width, seed=height * 100 + width, dtype=dtype)
    table = 2 * normal(HEADS, (2 * window - 1) ** 2, seed=window, dtype=dtype)
    return qkv, torch.nn.Parameter(table)


def attend(qkv: Tensor, table: Tensor, window: int, backend: str) -> Tensor:
    return window_attention(qkv, table, window=window, heads=HEADS, backend=backend)


def rounding(qkv: Tensor, table: Tensor, dtype: torch.dtype) -> float:
    """What rounding to `dtype` may cost: an error e of a score changes its weight by the factor 1 + e.

    The output is an average of v, so it is off by at most that times the largest v, and some roundings of it.
    """
    _, k, v = qkv.detach().double().chunk(3, dim=1)
    score = k.abs().max() ** 2 * (k.shape[1] // HEADS) ** 0.5 + table.detach().double().abs().max()
    return float(torch.finfo(dtype).eps * (2 * score + 8) * v.abs().max())


# --- padding and windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_reflect_pad_is_numpys(multiple: int) -> None:
    for height in range(1, 12):
        for width in range(1, 12):
            x = normal(2, 3, height, width)
            bottom, right = -height % multiple, -width % multiple
            expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="reflect")
            assert np.array_equal(reflect_pad_to_multiple(x, multiple).numpy(), expected), (height, width)
            assert np.array_equal(x.numpy()[:, :, :, reflected_indices(width, width + right)], expected[:, :, :height])


def test_reflect_pad_repeats_a_single_row_and_copies_nothing_without_need() -> None:
    row = normal(1, 2, 1, 5)
    assert torch.equal(reflect_pad_to_multiple(row, 4)[..., :5], row.expand(1, 2, 4, 5))
    whole = normal(1, 2, 4, 8)
    assert reflect_pad_to_multiple(whole, 4) is whole


def test_windows_are_cut_in_reading_order_and_put_back() -> None:
    window, head_dim = 2, 3
    qkv = torch.arange(2 * 3 * HEADS * head_dim * 4 * 6).reshape(2, -1, 4, 6)
    parts = split_windows(qkv, window, HEADS)
    for part, values in zip(parts, qkv.chunk(3, dim=1), strict=True):
        assert part.shape == (2 * 6, HEADS, window**2, head_dim)
        for b in range(2):
            for row in range(2):
                for column in range(3):
                    patch = values[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                    expected = patch.reshape(HEADS, head_dim, window**2).transpose(1, 2)
                    assert torch.equal(part[b * 6 + row * 3 + column], expected)
        assert torch.equal(merge_windows(part, window, 4, 6), values)
        assert torch.equal(merge_windows(part, window, 3, 5), values[:, :, :3, :5])


# --- the bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 4])
def test_dense_bias_is_the_formula(window: int) -> None:
    table = normal(HEADS, (2 * window - 1) ** 2)
    assert torch.equal(dense_bias(table, window), loop_bias(table, window))


@pytest.mark.parametrize("window", [3, 4])
def test_gradient_of_dense_bias_is_that_of_the_formula(window: int) -> None:
    table = normal(HEADS, (2 * window - 1) ** 2, dtype=torch.float64).requires_grad_()
    cotangent = normal(HEADS, window**2, window**2, seed=3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(dense_bias(table, window), table, cotangent)
    (expected,) = torch.autograd.grad(loop_bias(table, window), table, cotangent)
    assert max_error(gradient, expected) < 1e-13


@pytest.mark.parametrize("window", [1, 3, 4, 8])
def test_relative_index_agrees_with_dense_bias(window: int) -> None:
    table = normal(HEADS, (2 * window - 1) ** 2)
    tokens = torch.arange(window**2)
    index = relative_index(tokens[:, None], tokens[None, :], window)
    assert torch.equal(table[:, index], dense_bias(table, window))
    assert index.min() == 0
    assert index.max() == (2 * window - 1) ** 2 - 1


# --- every backend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_backend_against_loops(backend: str, window: int, device: str) -> None:
    """Flex attention is compiled here for another window than in the other tests: some 5 s on a CPU."""
    head_dim = 16 if device == "cuda" else 8  # flex attention's least on a GPU
    for batch, (height, width) in [(2, SIZES[-1]), *((1, size) for size in (SIZES if window == 8 else [(3, 9)]))]:
        qkv, table = inputs(batch, height, width, window=window, head_dim=head_dim)
        expected = loop_attention(qkv, table, window, HEADS)
        with torch.no_grad():
            qkv, table = qkv.to(device), table.to(device)
            error = max_error(attend(qkv, table, window, backend), expected)
            error_of_naive = max_error(attend(qkv, table, window, "naive"), expected)
        ulp = torch.finfo(torch.float32).eps * qkv.abs().max().item()
        assert error_of_naive <= rounding(qkv, table, torch.float32), (height, width)
        assert error <= 2 * error_of_naive + 4 * ulp, (height, width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["auto", *TRAINABLE])
def test_backend_in_half_precision(backend: str, dtype: torch.dtype, device: str) -> None:
    for height, width in [(20, 27), (3, 8)]:
        qkv, table = inputs(2, height, width, window=8, dtype=dtype)
        expected = loop_attention(qkv, table, 8, HEADS)
        with torch.no_grad():
            qkv, table = qkv.to(device), table.to(device)
            out = attend(qkv, table, 8, backend)
            error_of_naive = max_error(attend(qkv, table, 8, "naive"), expected)
        ulp = torch.finfo(dtype).eps * qkv.abs().max().item()
        assert out.dtype == dtype
        assert error_of_naive <= rounding(qkv, table, dtype)
        assert max_error(out, expected) <= 2 * error_of_naive + 4 * ulp


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_backend_under_autocast(backend: str, device: str) -> None:
    """There the projection is in half precision, and the table, a parameter, is not."""
    qkv, table = inputs(2, 11, 9, window=4)
    qkv = qkv.to(torch.bfloat16)
    expected = loop_attention(qkv, table, 4, HEADS)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        out = attend(qkv.to(device), table.to(device), 4, backend)
    assert max_error(out, expected) <= rounding(qkv, table, torch.bfloat16)


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 2)])
@pytest.mark.parametrize("backend", TRAINABLE)
def test_gradients_to_q_k_v_and_table(backend: str, size: tuple[int, int]) -> None:
    qkv, table = inputs(1, *size, window=3, head_dim=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: attend(*args, 3, backend), (qkv.requires_grad_(), table))


@needs_cuda
def test_gradients_of_flex_on_a_gpu() -> None:
    """Its error is at most twice that of the reference in the same precision, both against float64."""

    def gradients(qkv: Tensor, table: Tensor, backend: str) -> list[Tensor]:
        leaves = [qkv.detach().requires_grad_(), table.detach().requires_grad_()]
        out = attend(*leaves, 8, backend)
        return list(torch.autograd.grad(out, leaves, normal(*out.shape, seed=3, dtype=out.dtype).to(out.device)))

    qkv, table = (value.detach().cuda() for value in inputs(2, 20, 27, window=8, head_dim=16))
    expected = gradients(qkv.double(), table.double(), "naive")
    naive, flex = gradients(qkv, table, "naive"), gradients(qkv, table, "flex")
    for exact, plain, gradient in zip(expected, naive, flex, strict=True):
        ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert max_error(gradient, exact) <= 2 * max_error(plain, exact) + 4 * ulp


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_of_any_layout_is_left_as_it_was(backend: str) -> None:
    for height, width in [(20, 27), (8, 8), (16, 8), (3, 1)]:
        qkv, table = inputs(1, height, width, window=8)
        wide = torch.cat([qkv, qkv], dim=3)
        layouts = {
            "channels last": qkv.contiguous(memory_format=torch.channels_last),
            "part of a wider map": wide[..., width:],
            "transposed": qkv.transpose(2, 3).contiguous().transpose(2, 3),
        }
        with torch.no_grad():
            expected = attend(qkv, table, 8, backend)
            for name, value in layouts.items():
                versions = value._version, table._version
                assert max_error(attend(value, table, 8, backend), expected) < 1e-5, name
                assert (value._version, table._version) == versions
                assert torch.equal(value, qkv), name


# --- choice and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "backend"),
    [("Naive", "naive"), ("SDPA", "sdpa"), ("Flex", "flex"), ("AUTO", "auto"), ("sdpa", "sdpa")],
)
def test_spellings(spelling: str, backend: str) -> None:
    assert WINDOW_ATTENTION.resolve(spelling) == backend


def test_unknown_backend() -> None:
    qkv, table = inputs(1, 4, 4, window=4)
    with pytest.raises(ValueError, match=r"'xformers' is not known; allowed: auto, naive, sdpa, flex, .+ \(in any"):
        attend(qkv, table, 4, "xformers")


@pytest.mark.parametrize("shape", [(48, 8, 8), (1, 50, 8, 8), (1, 1, 48, 8, 8)])
def test_wrong_shape_of_qkv(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv has shape .*; it must be \(B, 3C, H, W\), C a multiple of 2 heads"):
        attend(torch.zeros(shape), torch.zeros(2, 49), 4, "auto")


@pytest.mark.parametrize("shape", [(2, 64), (1, 49), (49,), (2, 7, 7)])
def test_wrong_shape_of_the_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias table has shape .*; it must be \(h = 2, T = 49\)"):
        attend(torch.zeros(1, 48, 8, 8), torch.zeros(shape), 4, "auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_auto_never_raises_on_the_cpu(dtype: torch.dtype, requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)  # no compiler either
    qkv, table = inputs(1, 5, 3, window=4, dtype=dtype)
    out = attend(qkv.requires_grad_(requires_grad), table.requires_grad_(requires_grad), 4, "auto")
    assert out.requires_grad == requires_grad
    assert out.isfinite().all()


def test_backend_by_name_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    qkv, table = inputs(1, 8, 8, window=8)
    with pytest.raises(UnusableBackend) as info:
        attend(qkv.requires_grad_(), table, 8, "Flex")
    assert isinstance(info.value, UserError)  # the command line tells it in one line
    message = str(info.value)
    assert "attn_type flex cannot run here" in message
    assert "PyTorch's flex attention has no backward pass on the CPU" in message
    assert "needs a C++ compiler" in message
    assert "attn_type: auto" in message


def test_flex_refuses_other_devices() -> None:
    qkv, table = (value.to("meta") for value in inputs(1, 8, 8, window=8))
    with pytest.raises(RuntimeError, match="it runs on cpu and cuda, not on meta"):
        attend(qkv, table, 8, "flex")


@needs_cuda
def test_flex_refuses_small_heads_on_a_gpu() -> None:
    qkv, table = (value.cuda() for value in inputs(1, 8, 8, window=8, head_dim=8))
    with pytest.raises(RuntimeError, match="needs a head dimension of 16 or more, not 8"):
        attend(qkv, table, 8, "flex")


@needs_compiler
def test_flex_refuses_gradients_only_where_they_are_recorded() -> None:
    """A table that is a parameter is no obstacle to inference."""
    qkv, table = inputs(1, 20, 27, window=8)
    assert table.requires_grad
    with pytest.raises(RuntimeError, match="no backward pass"):
        attend(qkv, table, 8, "flex")
    with torch.no_grad():
        assert attend(qkv, table, 8, "flex").shape == (1, 16, 20, 27)


@pytest.mark.parametrize(("window", "heads"), [(0, 2), (4, 0), (-1, 2)])
def test_window_and_heads_have_to_be_positive(window: int, heads: int) -> None:
    with pytest.raises(ValueError, match=rf"window is {window} and heads is {heads}; both must be at least 1"):
        window_attention(torch.zeros(1, 48, 8, 8), torch.zeros(2, 49), window=window, heads=heads)


@needs_compiler
def test_flex_refuses_float64() -> None:
    qkv, table = inputs(1, 8, 8, window=8, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"take float32, bfloat16 and float16, not torch\.float64"):
        attend(qkv, table, 8, "flex")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_a_half_precision_map_with_a_float32_table(backend: str, dtype: torch.dtype) -> None:
    """As under autocast, where the table, a parameter, stays what it is."""
    qkv, table = inputs(1, 8, 8, window=4)
    out = attend(qkv.to(dtype), table, 4, backend)
    assert out.dtype == dtype
    expected = attend(qkv.to(dtype).double(), table.double(), 4, "naive")
    assert max_error(out, expected) < 4 * torch.finfo(dtype).eps
