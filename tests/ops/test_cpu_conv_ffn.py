"""ConvFFN's C++ operators against the reference in float64, in all that a network does with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from networks import max_error, normal
from test_conv_ffn import arguments
from test_layer_norm import check_results_of, results_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esc_arch.modules import ConvFFN
from esc_arch.ops.conv_ffn import conv_ffn, conv_ffn_fused

pytestmark = pytest.mark.usefixtures("native")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


results = partial(results_of, conv_ffn)
check_results = partial(check_results_of, conv_ffn)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "hidden"),
    [
        ((1, 64, 1, 1), 80),
        ((2, 64, 1, 7), 128),
        ((3, 8, 3, 2), 6),
        ((1, 48, 45, 33), 60),
        ((2, 7, 9, 200), 20),
        ((1, 64, 5, 300), 80),
    ],
)
def test_output_and_gradients(size: tuple[int, ...], hidden: int, layout: torch.memory_format) -> None:
    values = list(arguments(*size, hidden=hidden))
    values[0] = values[0].contiguous(memory_format=layout)
    check_results(values)


def test_numbers_of_all_sizes() -> None:
    """Where the GELU bends, and where it is a line."""
    values = list(arguments(1, 16, 20, 20, hidden=20))
    values[0] *= torch.logspace(-3, 1.5, 20)
    check_results(values)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_results(arguments(2, 8, 23, 11, hidden=10))
        first, second = (results(arguments(2, 8, 23, 11, hidden=10), "cpu") for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(before)


def test_every_strange_layout() -> None:
    values = list(arguments(2, 8, 6, 10, hidden=10))
    wide = normal(2, 8, 6, 20, seed=9)
    values[0] = wide[..., ::2]
    values[1] = values[1].transpose(0, 1).contiguous().transpose(0, 1)
    values[3] = values[3].flip(-1).contiguous().flip(-1)
    unchanged = [value.clone() for value in values]
    check_results(values)
    assert all(torch.equal(value, before) for value, before in zip(values, unchanged, strict=True))


@pytest.mark.parametrize("size", [(0, 8, 4, 4), (1, 8, 0, 4), (1, 8, 4, 0)])
def test_nothing_of_nothing(size: tuple[int, ...]) -> None:
    out, *gradients = results(arguments(*size, hidden=10), "cpu")
    assert out.shape == size
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6])
def test_nan_and_infinity_are_not_hidden(place: int) -> None:
    values = list(arguments(1, 8, 4, 4, hidden=10))
    values[place].view(-1)[0] = torch.nan
    assert conv_ffn(*values, backend="cpu").isnan().any()
    values[place].view(-1)[0] = torch.inf
    assert not conv_ffn(*values, backend="cpu").isfinite().all()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4, 6), ()])
def test_frozen_parameters(wanted: tuple[int, ...]) -> None:
    values = arguments(1, 8, 5, 4, hidden=10)
    expected = results(values, "cpu")[1:]
    leaves = [value.detach().requires_grad_(index in wanted) for index, value in enumerate(values)]
    out = conv_ffn(*leaves, backend="cpu")
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(normal(*out.shape, seed=8))
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[index])


def test_compiled() -> None:
    values = arguments(1, 8, 5, 4, hidden=10)
    leaves = [value.detach().requires_grad_() for value in values]
    compiled = torch.compile(lambda *args: conv_ffn(*args, backend="cpu") * 2, backend="aot_eager", fullgraph=True)
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out, leaves, normal(*out.shape, seed=8))
    expected, *of_expected = results(values, "cpu")
    assert torch.equal(out, 2 * expected)
    assert max(max_error(a, 2 * b) for a, b in zip(gradients, of_expected, strict=True)) < 1e-4


def test_operators_are_what_torch_library_expects() -> None:
    values = [value.requires_grad_() for value in arguments(2, 8, 5, 4, hidden=10)]
    for layout in LAYOUTS:
        x = values[0].detach().contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(torch.ops.esc_arch.conv_ffn_cpu.default, (x, *values[1:]))
        detached = [value.detach() for value in (normal(*x.shape), x, *values[1:6])]
        torch.library.opcheck(torch.ops.esc_arch.conv_ffn_backward_cpu.default, (*detached, True, True))


def test_second_derivatives_are_refused() -> None:
    leaves = [value.requires_grad_() for value in arguments(1, 8, 2, 2, hidden=10)]
    values, norm = step_arguments(1, 8, 2, 2)
    of_step = [value.requires_grad_() for value in values]
    for out, of in ((conv_ffn(*leaves, backend="cpu"), leaves), (step(of_step, norm, 0)[0], of_step)):
        with pytest.raises(RuntimeError, match="no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True"):
            torch.autograd.grad(out.sum(), of, create_graph=True)


def layer_and_gradients(layer: nn.Module, x: Tensor, *, checkpointed: bool = False) -> tuple[Tensor, list[Tensor]]:
    layer.zero_grad()
    out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    out.square().sum().backward()
    return out.detach(), [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]


def test_the_layer_checkpointed_copied_and_saved() -> None:
    layer = ConvFFN(8, 1.25)
    x = normal(2, 8, 5, 7)
    out, gradients = layer_and_gradients(layer, x)
    again, of_again = layer_and_gradients(layer, x.requires_grad_(), checkpointed=True)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_again, strict=True))
    copied = copy.deepcopy(layer)
    loaded = ConvFFN(8, 1.25)
    loaded.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer.proj.weight.zero_()
        assert torch.equal(copied(x), out)
        assert torch.equal(loaded(x), out)
        assert not torch.equal(layer(x), out)


def test_tied_weights_get_both_gradients() -> None:
    tied, apart = (nn.Sequential(ConvFFN(8, 1), ConvFFN(8, 1)) for _ in range(2))
    tied[1].dwc = tied[0].dwc
    apart.load_state_dict(tied.state_dict())
    x = normal(1, 8, 4, 4)
    layer_and_gradients(tied, x)
    layer_and_gradients(apart, x)
    both = apart[0].dwc.weight.grad + apart[1].dwc.weight.grad
    assert max_error(tied[0].dwc.weight.grad, both) < 1e-4 * both.abs().max().item()


def test_under_autocast_the_layer_is_in_half_precision() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ConvFFN(8, 1)(normal(1, 8, 4, 4)).dtype == torch.bfloat16


EPS = 1e-6
STEP_SIZES = [((1, 64, 1, 1), 80), ((3, 7, 4, 5), 6), ((2, 20, 3, 2), 33), ((1, 48, 9, 301), 128), ((1, 5, 31, 3), 6)]


def step_arguments(*size: int, hidden: int = 10, norm: bool = True) -> tuple[list[Tensor], list[Tensor | None]]:
    x, *parameters = arguments(*size, hidden=hidden)
    x = (3 * x + 2).contiguous(memory_format=torch.channels_last)
    return [x, *parameters], [normal(size[1], seed=11), normal(size[1], seed=12)] if norm else [None, None]


def step_by_parts(
    values: Sequence[Tensor], norm: Sequence[Tensor | None], pooled: int, dtype: torch.dtype
) -> list[Tensor]:
    x, *parameters = (value.to(dtype) for value in values)
    weight, bias = (None if value is None else value.to(dtype) for value in norm)
    if weight is not None:
        x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS).permute(0, 3, 1, 2)
    out = conv_ffn(x, *parameters, backend="reference")
    return [out, out[:, :pooled].mean((2, 3))]


def step(values: Sequence[Tensor], norm: Sequence[Tensor | None], pooled: int) -> tuple[Tensor, Tensor | None]:
    done = conv_ffn_fused(values[0], *norm, EPS, *values[1:], pooled=pooled)
    assert done is not None
    return done


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("size", "hidden"), STEP_SIZES)
def test_step_is_its_parts(size: tuple[int, ...], hidden: int, norm: bool) -> None:
    values, of_norm = step_arguments(*size, hidden=hidden, norm=norm)
    for pooled in (0, 5):
        exact = step_by_parts(values, of_norm, pooled, torch.float64)
        usual = step_by_parts(values, of_norm, pooled, torch.float32)
        for wanted, plain, got in zip(exact, usual, step(values, of_norm, pooled), strict=True):
            assert got.shape == wanted.shape
            if wanted.numel():
                ulp = torch.finfo(torch.float32).eps * wanted.abs().max().item()
                assert max_error(got, wanted) <= 2 * max_error(plain, wanted) + 8 * ulp


def step_gradients(
    values: Sequence[Tensor], norm: Sequence[Tensor | None], dtype: torch.dtype | None, frozen: Sequence[int] = ()
) -> list[Tensor]:
    """The output and the gradients of all that is not frozen: step by step in a type, or, for None, of the operator."""
    leaves = [None if value is None else value.detach().to(dtype or torch.float32) for value in (*values, *norm)]
    wanted = [leaf for index, leaf in enumerate(leaves) if leaf is not None and index not in frozen]
    for leaf in wanted:
        leaf.requires_grad_()
    given, of_norm = leaves[: len(values)], leaves[len(values) :]
    out = step(given, of_norm, 3)[0] if dtype is None else step_by_parts(given, of_norm, 0, dtype)[0]
    return [out.detach(), *torch.autograd.grad(out, wanted, normal(*out.shape, seed=8).to(out.dtype))]


@pytest.mark.parametrize(
    ("norm", "frozen"), [(True, ()), (False, ()), (True, (0,)), (True, (0, 7, 8)), (True, (1, 2, 3, 4, 5, 6))]
)
@pytest.mark.parametrize(("size", "hidden"), STEP_SIZES)
def test_gradients_of_a_step(size: tuple[int, ...], hidden: int, norm: bool, frozen: tuple[int, ...]) -> None:
    values, of_norm = step_arguments(*size, hidden=hidden, norm=norm)
    exact, plain, fast = (
        step_gradients(values, of_norm, dtype, frozen) for dtype in (torch.float64, torch.float32, None)
    )
    for index, (wanted, usual, got) in enumerate(zip(exact, plain, fast, strict=True)):
        ulp = torch.finfo(torch.float32).eps * wanted.abs().max().item()
        assert max_error(got, wanted) <= 2 * max_error(usual, wanted) + 8 * ulp, index


def test_means_are_left_out_where_gradients_are_wanted() -> None:
    values, norm = step_arguments(1, 8, 5, 4)
    assert step(values, norm, 3)[1] is not None
    assert step([values[0].requires_grad_(), *values[1:]], norm, 3)[1] is None


def test_step_leaves_strange_layouts_unchanged() -> None:
    values, norm = step_arguments(2, 8, 6, 10)
    values[0] = normal(2, 6, 20, 12, seed=9).permute(0, 3, 1, 2)[:, 2:10, :, ::2]
    values[1] = values[1].transpose(0, 1).contiguous().transpose(0, 1)
    norm[0] = normal(16, seed=9)[::2]
    unchanged = [value.clone() for value in values]
    got, wanted = step(values, norm, 3), step_by_parts(values, norm, 3, torch.float64)
    assert max(max_error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5
    assert all(torch.equal(value, before) for value, before in zip(values, unchanged, strict=True))


def test_step_is_the_same_with_any_number_of_threads() -> None:
    values, norm = step_arguments(2, 20, 37, 150, hidden=33)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = step(values, norm, 17)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(one, other) for one, other in zip(alone, step(values, norm, 17), strict=True))
    finally:
        torch.set_num_threads(before)


def test_step_averages_many_pixels_accurately() -> None:
    values, norm = step_arguments(1, 8, 300, 200)
    exact = step_by_parts(values, norm, 8, torch.float64)[1]
    assert max_error(step(values, norm, 8)[1], exact) < 3e-7


@pytest.mark.parametrize("size", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0)])
def test_step_of_nothing(size: tuple[int, ...]) -> None:
    values, norm = step_arguments(*size)
    out, means = step(values, norm, 3)
    assert out.shape == size
    assert means.shape == (size[0], 3)
    assert means.isnan().all()


def test_step_lets_nan_through() -> None:
    values, norm = step_arguments(2, 20, 5, 6)
    values[0][1, 3, 2, 4] = torch.nan
    out, means = step(values, norm, 20)
    assert torch.equal(out.isnan(), step_by_parts(values, norm, 20, torch.float32)[0].isnan())
    assert torch.equal(means.isnan(), torch.tensor([[False], [True]]).expand(2, 20))


def test_step_compiled() -> None:
    values, norm = step_arguments(2, 8, 5, 4)
    compiled = torch.compile(lambda *args: step(args[:7], args[7:], 3), backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*values, *norm), step(values, norm, 3), strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(torch.ops.esc_arch.conv_ffn_fused_cpu.default, (values[0], *norm, EPS, *values[1:], 3))
    leaves = [value.requires_grad_() for value in values]
    torch.library.opcheck(torch.ops.esc_arch.conv_ffn_fused_cpu.default, (leaves[0], *norm, EPS, *leaves[1:], 0))
    torch.library.opcheck(torch.ops.esc_arch.conv_ffn_fused_cpu.default, (leaves[0], None, None, EPS, *leaves[1:], 0))


def test_where_no_step_can() -> None:
    values, norm = step_arguments(1, 8, 5, 4)
    assert conv_ffn_fused(values[0], *norm, EPS, *values[1:]) is not None
    assert conv_ffn_fused(values[0].contiguous(), *norm, EPS, *values[1:]) is None
    doubled = [value.double() for value in values]
    assert conv_ffn_fused(doubled[0], *norm, EPS, *doubled[1:]) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv_ffn_fused(values[0], *norm, EPS, *values[1:]) is None


def test_step_refuses_what_does_not_fit() -> None:
    values, norm = step_arguments(1, 8, 5, 4)
    with pytest.raises(RuntimeError, match="more channels are to be averaged than there are"):
        conv_ffn_fused(values[0], *norm, EPS, *values[1:], pooled=9)
    with pytest.raises(ValueError, match="norm_weight and norm_bias must be given together"):
        conv_ffn_fused(values[0], norm[0], None, EPS, *values[1:])
    with pytest.raises(ValueError, match=r"dwc_bias has shape \(10, 8, 1, 1\); it must be \(M = 10\)"):
        conv_ffn_fused(values[0], *norm, EPS, *values[1:4], values[1], *values[5:])
