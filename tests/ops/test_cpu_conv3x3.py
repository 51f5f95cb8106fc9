"""3 x 3 convolutions, also with normalisation and addition, against the plain formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from networks import max_error, normal, sum_rounding
from torch import Tensor

from esc_arch.ops.conv3x3 import api, conv3x3, conv3x3_fused

pytestmark = pytest.mark.usefixtures("native")

EPS = 1e-6
Arguments = list[Tensor | float | None]


def arguments(
    batch: int, inputs: int, outputs: int, size: tuple[int, int], *, norm: bool = True, residual: bool = True
) -> Arguments:
    """A map with a mean away from zero, and weights as layers begin with."""
    x, added = (
        (normal(batch, channels, *size, seed=seed) + 0.5).contiguous(memory_format=torch.channels_last)
        for seed, channels in ((1, inputs), (2, outputs))
    )
    weight = normal(outputs, inputs, 3, 3, seed=3) / (3 * inputs**0.5)
    of_norm = (1 + 0.2 * normal(inputs, seed=4), 0.2 * normal(inputs, seed=5)) if norm else (None, None)
    return [x, *of_norm, EPS, weight, normal(outputs, seed=6), added if residual else None]


def formula(values: Arguments, dtype: torch.dtype) -> Tensor:
    x, norm_weight, norm_bias, eps, weight, bias, residual = (
        value.to(dtype) if isinstance(value, Tensor) else value for value in values
    )
    if norm_weight is not None:
        x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps).permute(0, 3, 1, 2)
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


def operator(values: Arguments) -> Tensor:
    """Whatever the size: the function leaves small maps to PyTorch."""
    return torch.ops.esc_arch.conv3x3_fused_cpu(*values)


def check(values: Arguments) -> None:
    exact, out = formula(values, torch.float64), operator(values)
    rounding = sum_rounding(exact, 9 * values[0].shape[1])
    assert max_error(out, exact) <= 3 * max_error(formula(values, torch.float32), exact) + rounding
    assert out.is_contiguous(memory_format=torch.channels_last)


def most_terms(batch: int, inputs: int, outputs: int, height: int, width: int) -> int:
    """Of the sums that the output and its gradients are: over channels and taps, or over pixels."""
    return max(9 * inputs, 9 * outputs, batch * height * width)


SIZES = [(1, 1), (1, 9), (9, 1), (4, 4), (5, 6), (3, 300), (31, 73)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("norm", "residual"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_formula(size: tuple[int, int], norm: bool, residual: bool) -> None:
    check(arguments(2, 20, 13, size, norm=norm, residual=residual))


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(64, 64), (64, 12), (64, 27), (64, 48), (3, 64), (1, 1), (16, 96), (150, 40), (7, 200)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_channels(batch: int, inputs: int, outputs: int) -> None:
    check(arguments(batch, inputs, outputs, (18, 22)))


def test_without_bias() -> None:
    values = arguments(1, 16, 16, (9, 10))
    values[5] = None
    check(values)


def test_the_padding_is_zero_after_the_normalisation() -> None:
    values = arguments(1, 16, 4, (6, 6), residual=False)
    values[0] = torch.ones_like(values[0])  # normalised to zero, so that only norm_bias passes
    bias_everywhere = values[2][:, None, None].expand(1, 16, 6, 6)
    expected = F.conv2d(bias_everywhere, values[4], values[5], padding=1)
    assert max_error(operator(values), expected) < 1e-5
    assert max_error(expected[..., 0, 0], expected[..., 3, 3]) > 1e-3


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    values = arguments(2, 20, 17, (45, 90))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = operator(values)
        torch.set_num_threads(threads)
        assert torch.equal(operator(values), expected)
    finally:
        torch.set_num_threads(before)


def test_an_image_does_not_depend_on_the_others() -> None:
    values = arguments(3, 20, 17, (13, 30))
    expected = operator(values)[1:2]
    values[0], values[6] = values[0][1:2], values[6][1:2]
    assert torch.equal(operator(values), expected)


def test_every_strange_layout() -> None:
    values = arguments(2, 20, 17, (13, 30))
    values[0] = normal(2, 20, 13, 60, seed=9)[..., ::2]
    values[6] = normal(2, 17, 30, 13, seed=10).transpose(2, 3)
    values[4] = values[4].contiguous(memory_format=torch.channels_last)
    values[5] = normal(34, seed=11)[::2]
    unchanged = [value.clone() for value in values if isinstance(value, Tensor)]
    check(values)
    after = [value for value in values if isinstance(value, Tensor)]
    assert all(torch.equal(value, before) for value, before in zip(after, unchanged, strict=True))


@pytest.mark.parametrize("size", [(0, 16, 4, 4), (1, 16, 0, 4), (1, 16, 4, 0)])
def test_nothing_of_nothing(size: tuple[int, int, int, int]) -> None:
    values = arguments(size[0], 16, 8, size[2:])
    assert operator(values).shape == (size[0], 8, *size[2:])


@pytest.mark.parametrize("place", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_not_hidden(place: int, value: float) -> None:
    values = arguments(1, 16, 8, (30, 30))
    values[place][(0,) * values[place].dim()] = value
    out = operator(values)
    assert not out.isfinite().all()
    if place in (0, 6):
        assert out[..., 10:, 10:].isfinite().all()


def test_where_it_is_left_to_pytorch() -> None:
    values = arguments(1, 16, 16, (16, 16))

    def runs(place: int = 0, tensor: Tensor | None = values[0]) -> bool:
        return conv3x3_fused(*values[:place], tensor, *values[place + 1 :]) is not None

    weight = values[4]
    assert runs()
    assert not runs(tensor=values[0].contiguous())
    assert not runs(tensor=values[0].to("meta"))
    assert not runs(4, weight.double())
    assert runs(4, weight.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs()
    assert conv3x3_fused(*arguments(1, 16, 16, (15, 17))) is None
    assert conv3x3_fused(*arguments(1, 15, 16, (16, 16))) is None
    assert conv3x3_fused(*arguments(2, 16, 16, (8, 16))) is not None


def test_an_exported_network_keeps_the_formula() -> None:
    values = arguments(1, 16, 16, (16, 16))

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = conv3x3_fused(x, *values[1:])
            return x if out is None else out

    program = torch.export.export(Net(), (values[0],))
    assert "conv3x3_fused" not in str(program.graph)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (16, 16, 16), r"x has shape \(16, 16, 16\); it must be \(B, C = 16, H, W\)"),
        (4, (8, 16, 5, 5), r"weight has shape \(8, 16, 5, 5\); it must be \(D = 8, C = 16, 3, 3\)"),
        (1, (15,), r"norm_weight has shape \(15,\); it must be \(C = 16\)"),
        (5, (16,), r"bias has shape \(16,\); it must be \(D = 8\)"),
        (6, (1, 16, 16, 16), r"residual has shape .*; it must be \(B = 1, D = 8, H = 16, W = 16\)"),
    ],
)
def test_shapes_that_do_not_fit(place: int, shape: tuple[int, ...], message: str) -> None:
    values = arguments(1, 16, 8, (16, 16))
    values[place] = normal(*shape)
    with pytest.raises(ValueError, match=message):
        conv3x3_fused(*values)
    with pytest.raises(RuntimeError, match="conv3x3"):
        operator(values)


def test_half_a_normalisation() -> None:
    values = arguments(1, 16, 8, (16, 16))
    values[2] = None
    with pytest.raises(ValueError, match="norm_weight and norm_bias must be given together"):
        conv3x3_fused(*values)


def test_compiled() -> None:
    values = arguments(1, 16, 8, (16, 20))
    compiled = torch.compile(lambda *args: conv3x3_fused(*args) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*values), 2 * operator(values))


def step_gradients(values: Arguments, dtype: torch.dtype | None, frozen: Sequence[int] = ()) -> list[Tensor]:
    """The output and the gradients of all that is not frozen: by the formula in a type; None: the operator."""
    leaves = [value.detach().to(dtype or value.dtype) if isinstance(value, Tensor) else value for value in values]
    wanted = [leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and index not in frozen]
    for leaf in wanted:
        leaf.requires_grad_()
    out = operator(leaves) if dtype is None else formula(leaves, dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, normal(*out.shape, seed=8).to(out.dtype))]


@pytest.mark.parametrize(
    ("norm", "residual", "frozen"),
    [
        (True, True, ()),
        (False, False, ()),
        (True, False, (0,)),
        (True, True, (0, 1, 2, 6)),
        (True, True, (4, 5)),
        (False, True, (0,)),
    ],
)
@pytest.mark.parametrize("size", [(2, 16, 24, 17, 18), (1, 20, 7, 5, 33), (3, 64, 64, 1, 1)])
def test_gradients_of_a_step(size: tuple[int, ...], norm: bool, residual: bool, frozen: tuple[int, ...]) -> None:
    batch, inputs, outputs, *area = size
    values = arguments(batch, inputs, outputs, (area[0], area[1]), norm=norm, residual=residual)
    exact, plain, fast = (step_gradients(values, dtype, frozen) for dtype in (torch.float64, torch.float32, None))
    terms = most_terms(*size)
    for index, (wanted, usual, got) in enumerate(zip(exact, plain, fast, strict=True)):
        assert max_error(got, wanted) <= 3 * max_error(usual, wanted) + sum_rounding(wanted, terms), index


def test_second_derivatives_of_a_step_are_refused() -> None:
    values = arguments(1, 16, 8, (9, 8))
    leaves = [value.requires_grad_() if isinstance(value, Tensor) else value for value in values]
    with pytest.raises(RuntimeError, match="no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True"):
        torch.autograd.grad(operator(leaves).sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("plain", [False, True])
def test_the_operator_is_what_torch_library_expects(plain: bool) -> None:
    values = arguments(2, 16, 8, (9, 10), norm=not plain, residual=not plain)
    torch.library.opcheck(torch.ops.esc_arch.conv3x3_fused_cpu.default, tuple(values))
    leaves = tuple(value.requires_grad_() if isinstance(value, Tensor) else value for value in values)
    torch.library.opcheck(torch.ops.esc_arch.conv3x3_fused_cpu.default, leaves)


def with_gradients(values: Sequence[Tensor], dtype: torch.dtype, fast: bool) -> list[Tensor]:
    """The output, the gradients of everything, and those of the sum of the gradients' squares."""
    leaves = [value.to(dtype).requires_grad_() for value in values]
    out = torch.ops.esc_arch.conv3x3_cpu(*leaves) if fast else F.conv2d(*leaves, padding=1)
    upstream = normal(*out.shape, seed=8).to(dtype).requires_grad_()
    first = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    total = sum(gradient.square().sum() for gradient in first)
    return [out, *first, *torch.autograd.grad(total, [*leaves[:2], upstream])]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 16, 24, 17, 18), (1, 20, 7, 5, 33), (3, 5, 16, 1, 1)])
def test_gradients_and_their_gradients(size: tuple[int, ...], layout: torch.memory_format) -> None:
    batch, inputs, outputs, *area = size
    x = normal(batch, inputs, *area).contiguous(memory_format=layout)
    values = (x, normal(outputs, inputs, 3, 3, seed=3) / (3 * inputs**0.5), normal(outputs, seed=4))
    exact, plain, fast = (
        with_gradients(values, dtype, fast)
        for dtype, fast in ((torch.float64, False), (torch.float32, False), (torch.float32, True))
    )
    terms = most_terms(*size)
    for index, (wanted, usual, got) in enumerate(zip(exact, plain, fast, strict=True)):
        assert max_error(got, wanted) <= 3 * max_error(usual, wanted) + sum_rounding(wanted, terms), index


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_frozen_parameters(wanted: tuple[int, ...]) -> None:
    values = (normal(1, 16, 16, 16).contiguous(memory_format=torch.channels_last), normal(8, 16, 3, 3), normal(8))
    leaves = [value.clone().requires_grad_(index in wanted) for index, value in enumerate(values)]
    out = conv3x3(*leaves)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.sum().backward()
    assert [index for index, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)


def test_where_the_plain_one_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(1, 16, 16, 16).contiguous(memory_format=torch.channels_last), normal(8, 16, 3, 3)
    taken = []
    monkeypatch.setattr(api.cpu, "forward", lambda *args: taken.append(args))
    conv3x3(x, weight, None)
    conv3x3(x, weight.requires_grad_(), None)
    assert len(taken) == 2
    for other in (x.contiguous(), x[..., :15]):
        assert torch.equal(conv3x3(other, weight, None), F.conv2d(other, weight, padding=1))
        with pytest.raises(RuntimeError, match=r"cpu: it takes maps with the channels innermost|so few pixels"):
            conv3x3(other, weight, None, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv3x3(x, weight, None).dtype == torch.bfloat16
    assert len(taken) == 2
    with pytest.raises(ValueError, match="x has shape"):
        conv3x3(x, normal(8, 4, 3, 3), None)


def test_the_plain_one_compiled() -> None:
    x, weight, bias = (
        normal(1, 16, 16, 20).contiguous(memory_format=torch.channels_last),
        normal(8, 16, 3, 3),
        normal(8),
    )
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    compiled = torch.compile(lambda *args: conv3x3(*args) * 2, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*leaves), 2 * torch.ops.esc_arch.conv3x3_cpu(*leaves)
    assert torch.equal(out, expected)
    gradients, wanted = (torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected))
    assert all(max_error(a, b) <= 1e-5 * b.abs().max().item() for a, b in zip(gradients, wanted, strict=True))


def test_the_plain_operator_is_what_torch_library_expects() -> None:
    x = normal(2, 16, 9, 10).contiguous(memory_format=torch.channels_last)
    leaves = [value.requires_grad_() for value in (x, normal(8, 16, 3, 3), normal(8))]
    torch.library.opcheck(torch.ops.esc_arch.conv3x3_cpu.default, leaves)
