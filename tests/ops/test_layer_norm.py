"""LayerNorm of maps: the formula, and the C++ operators against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from networks import max_error, normal
from torch import Tensor

from esc_arch.ops import operation
from esc_arch.ops.layer_norm import layer_norm

EPS = 1e-6
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def arguments(*size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A map with a mean well away from zero, weight and bias."""
    channels = size[1]
    weight, bias = (normal(channels, seed=seed, dtype=dtype) for seed in (2, 3))
    return 2 * normal(*size, seed=1, dtype=dtype) + 3, weight, bias


def results_of(
    function: Callable[..., Tensor], values: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The output and the gradients of everything."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in values]
    out = function(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=8).to(dtype))]


def check_results_of(function: Callable[..., Tensor], values: Sequence[Tensor]) -> None:
    exact = results_of(function, values, "reference", torch.float64)
    plain, fast = results_of(function, values, "reference"), results_of(function, values, "cpu")
    for index, (wanted, usual, got) in enumerate(zip(exact, plain, fast, strict=True)):
        ulp = torch.finfo(torch.float32).eps * wanted.abs().max().item()
        # (Few numbers may be exact by chance in one order of summing: the units allowed for that are of the largest)
        assert max_error(got, wanted) <= 2 * max_error(usual, wanted) + 8 * ulp, index


results = partial(results_of, partial(layer_norm, eps=EPS))
check_results = partial(check_results_of, partial(layer_norm, eps=EPS))


def test_reference_is_the_formula() -> None:
    x, weight, bias = arguments(2, 5, 3, 4, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    expected = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    assert max_error(layer_norm(x, weight, bias, eps=EPS, backend="reference"), expected) < 1e-13


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 64, 1, 1), (2, 64, 1, 7), (1, 8, 3, 2), (2, 48, 45, 33), (1, 20, 9, 200)])
def test_output_and_gradients(size: tuple[int, ...], layout: torch.memory_format) -> None:
    x, *parameters = arguments(*size)
    x = x.contiguous(memory_format=layout)
    check_results([x, *parameters])
    out = layer_norm(x, *parameters, eps=EPS, backend="cpu")
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in LAYOUTS:
            x, *parameters = arguments(2, 16, 40, 31)
            values = [x.contiguous(memory_format=layout), *parameters]
            check_results(values)
            first, second = (results(values, "cpu") for _ in range(2))
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("native")
def test_a_part_of_a_wider_map() -> None:
    x, *parameters = arguments(2, 8, 6, 20)
    check_results([x[..., ::2], *parameters])
    check_results([x.transpose(2, 3), *parameters])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_pixel_and_nan(layout: torch.memory_format) -> None:
    x, weight, bias = arguments(1, 8, 3, 3)
    x[0, :, 1, 1] = 5
    x[0, 2, 0, 2] = torch.nan
    out = layer_norm(x.contiguous(memory_format=layout), weight, bias, eps=EPS, backend="cpu")
    assert torch.equal(out[0, :, 1, 1], bias)
    assert torch.equal(out.isnan().any(1)[0].nonzero(), torch.tensor([[0, 2]]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [(0, 8, 4, 4), (1, 8, 0, 4)])
def test_nothing_of_nothing(size: tuple[int, ...]) -> None:
    out, *gradients = results(arguments(*size), "cpu")
    assert out.shape == size
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), ()])
def test_frozen_parameters(wanted: tuple[int, ...]) -> None:
    values = arguments(1, 8, 5, 4)
    expected = results(values, "cpu")[1:]
    leaves = [value.detach().requires_grad_(index in wanted) for index, value in enumerate(values)]
    out = layer_norm(*leaves, eps=EPS, backend="cpu")
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(normal(*out.shape, seed=8))
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[index])


@pytest.mark.usefixtures("native")
def test_compiled_and_as_torch_library_expects() -> None:
    values = [value.requires_grad_() for value in arguments(2, 8, 5, 4)]
    compiled = torch.compile(
        lambda *args: 2 * layer_norm(*args, eps=EPS, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    out = compiled(*values)
    gradients = torch.autograd.grad(out, values, normal(*out.shape, seed=8))
    expected, *of_expected = results(values, "cpu")
    assert torch.equal(out, 2 * expected)
    assert max(max_error(a, 2 * b) for a, b in zip(gradients, of_expected, strict=True)) < 1e-4
    for layout in LAYOUTS:
        x = values[0].detach().contiguous(memory_format=layout)
        torch.library.opcheck(torch.ops.esc_arch.layer_norm_cpu.default, (x.requires_grad_(), *values[1:], EPS))
        arguments_of_backward = (normal(*x.shape), x.detach(), values[1].detach(), EPS)
        torch.library.opcheck(torch.ops.esc_arch.layer_norm_backward_cpu.default, arguments_of_backward)


@pytest.mark.usefixtures("native")
def test_second_derivatives_are_refused() -> None:
    leaves = [value.requires_grad_() for value in arguments(1, 8, 2, 2)]
    with pytest.raises(RuntimeError, match="no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True"):
        torch.autograd.grad(layer_norm(*leaves, eps=EPS, backend="cpu").sum(), leaves, create_graph=True)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'fast' is not known; allowed: auto, reference, cpu \(in any case\)"):
        layer_norm(*arguments(1, 4, 2, 2), eps=EPS, backend="fast")


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_shapes_that_do_not_fit(changed: int) -> None:
    values = list(arguments(1, 4, 2, 2))
    values[changed] = values[changed][0]
    with pytest.raises(ValueError, match=r"(x|weight|bias) has shape .*; it must be \((B, C, H, W|C = 4)\)"):
        layer_norm(*values, eps=EPS)


def test_cpu_by_name_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation.cpu, "build_by_name", lambda: None)
    with pytest.raises(RuntimeError, match=r"it runs on cpu, not on meta; it takes float32, not torch\.float64\."):
        layer_norm(*(value.double().to("meta") for value in arguments(1, 4, 2, 2)), eps=EPS, backend="cpu")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(RuntimeError, match="an exported network keeps the plain formula"):
        layer_norm(*arguments(1, 4, 2, 2), eps=EPS, backend="cpu")
