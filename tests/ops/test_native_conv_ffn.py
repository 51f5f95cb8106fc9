"""ConvFFN's C++ operators against the reference in float64, in all that a network does with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from networks import max_error, normal
from test_conv_ffn import arguments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esc_arch.modules import ConvFFN
from esc_arch.ops.conv_ffn import conv_ffn

pytestmark = pytest.mark.usefixtures("native")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def results(values: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The output and the gradients of everything."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in values]
    out = conv_ffn(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=8).to(dtype))]


def check_results(values: Sequence[Tensor]) -> None:
    exact = results(values, "reference", torch.float64)
    plain, fast = results(values, "reference"), results(values, "cpp")
    for index, (wanted, usual, got) in enumerate(zip(exact, plain, fast, strict=True)):
        ulp = torch.finfo(torch.float32).eps * wanted.abs().max().item()
        # (Few numbers may be exact by chance in one order of summing: the units allowed for that are of the largest)
        assert max_error(got, wanted) <= 2 * max_error(usual, wanted) + 8 * ulp, index


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
        first, second = (results(arguments(2, 8, 23, 11, hidden=10), "cpp") for _ in range(2))
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
    out, *gradients = results(arguments(*size, hidden=10), "cpp")
    assert out.shape == size
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6])
def test_nan_and_infinity_are_not_hidden(place: int) -> None:
    values = list(arguments(1, 8, 4, 4, hidden=10))
    values[place].view(-1)[0] = torch.nan
    assert conv_ffn(*values, backend="cpp").isnan().any()
    values[place].view(-1)[0] = torch.inf
    assert not conv_ffn(*values, backend="cpp").isfinite().all()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4, 6), ()])
def test_frozen_parameters(wanted: tuple[int, ...]) -> None:
    values = arguments(1, 8, 5, 4, hidden=10)
    expected = results(values, "cpp")[1:]
    leaves = [value.detach().requires_grad_(index in wanted) for index, value in enumerate(values)]
    out = conv_ffn(*leaves, backend="cpp")
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(normal(*out.shape, seed=8))
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[index])


def test_compiled() -> None:
    values = arguments(1, 8, 5, 4, hidden=10)
    leaves = [value.detach().requires_grad_() for value in values]
    compiled = torch.compile(lambda *args: conv_ffn(*args, backend="cpp") * 2, backend="aot_eager", fullgraph=True)
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out, leaves, normal(*out.shape, seed=8))
    expected, *of_expected = results(values, "cpp")
    assert torch.equal(out, 2 * expected)
    assert max(max_error(a, 2 * b) for a, b in zip(gradients, of_expected, strict=True)) < 1e-4


def test_operators_are_what_torch_library_expects() -> None:
    values = [value.requires_grad_() for value in arguments(2, 8, 5, 4, hidden=10)]
    for layout in LAYOUTS:
        x = values[0].detach().contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(torch.ops.esc_arch.conv_ffn.default, (x, *values[1:]))
        detached = [value.detach() for value in (normal(*x.shape), x, *values[1:6])]
        torch.library.opcheck(torch.ops.esc_arch.conv_ffn_backward.default, (*detached, True, True))


def test_second_derivatives_are_refused() -> None:
    leaves = [value.requires_grad_() for value in arguments(1, 8, 2, 2, hidden=10)]
    with pytest.raises(RuntimeError, match="no second derivatives: use backend='reference' for create_graph=True"):
        torch.autograd.grad(conv_ffn(*leaves, backend="cpp").sum(), leaves, create_graph=True)


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
