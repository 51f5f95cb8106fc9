"""The C++ window attention, forward and gradients, held to the readable reference in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from networks import attention_rounding, max_error, normal, sum_rounding
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from esc_arch.ops import cpu as operators
from esc_arch.ops.window_attention import Bias, window_attention

#: Window, heads, head dimension, batch, height, width: maps smaller and larger than the window, exact and odd.
CASES = [
    (4, 1, 4, 2, 3, 9),
    (4, 2, 16, 1, 2, 1),
    (7, 3, 20, 1, 5, 16),
    (7, 2, 4, 2, 14, 7),
    (8, 4, 16, 2, 20, 27),
    (8, 2, 20, 1, 3, 1),
    (19, 1, 5, 1, 20, 30),
    (32, 1, 16, 1, 33, 40),
    (32, 2, 16, 1, 32, 32),
    (32, 1, 20, 1, 7, 50),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def table_bias(window: int, heads: int) -> Bias:
    return 2 * normal(heads, (2 * window - 1) ** 2, seed=window)


def factor_bias(window: int, heads: int) -> Bias:
    return normal(heads, window**2, 3, seed=window), normal(heads, window**2, 3, seed=window + 1)


BIASES = [pytest.param(table_bias, id="table"), pytest.param(factor_bias, id="factors")]


def results(qkv: Tensor, bias: Bias, window: int, heads: int, backend: str) -> list[Tensor]:
    """The output, and the gradients of qkv and of what the bias consists of."""
    parts = (bias,) if isinstance(bias, Tensor) else bias
    leaves = [part.detach().clone().requires_grad_() for part in (qkv, *parts)]
    given: Bias = leaves[1] if isinstance(bias, Tensor) else (leaves[1], leaves[2])
    out = window_attention(leaves[0], given, window=window, heads=heads, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent_of(out))]


def cotangent_of(out: Tensor) -> Tensor:
    return normal(*out.shape, seed=5).to(out.dtype)


def in_double(bias: Bias) -> Bias:
    return bias.double() if isinstance(bias, Tensor) else (bias[0].double(), bias[1].double())


@pytest.mark.parametrize("make_bias", BIASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(
    native: ModuleType, case: tuple[int, ...], layout: torch.memory_format, make_bias: type[Bias]
) -> None:
    """Errors at most twice those of the reference in float32, and rounding."""
    window, heads, dim, batch, height, width = case
    qkv = normal(batch, 3 * heads * dim, height, width).contiguous(memory_format=layout)
    bias = make_bias(window, heads)
    exact = results(qkv.double(), in_double(bias), window, heads, "naive")
    plain = results(qkv, bias, window, heads, "naive")
    ours = results(qkv, bias, window, heads, "cpu")
    roundings = [0.0, *attention_rounding(qkv, bias, cotangent_of(exact[0]), window, heads)]
    names = ["out", "qkv", "bias", "keys"]
    for name, expected, reference, value, rounding in zip(names, exact, plain, ours, roundings, strict=False):
        rounding += sum_rounding(expected, window**2)
        assert max_error(value, expected) <= 2 * max_error(reference, expected) + rounding, name
        assert value.shape == expected.shape


def test_a_map_of_one_pixel(native: ModuleType) -> None:
    """All tokens are alike: the output is v, and gradients of scores are differences of equal numbers."""
    qkv, bias = normal(1, 24, 1, 1), table_bias(4, 2)
    out, _, of_bias = results(qkv, bias, 4, 2, "cpu")
    assert max_error(out, qkv[:, 16:]) <= sum_rounding(out, 4**2)
    assert 0 < of_bias.abs().max() <= attention_rounding(qkv, bias, cotangent_of(out), 4, 2)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradient_keep_the_layout(native: ModuleType, layout: torch.memory_format) -> None:
    qkv = normal(2, 48, 9, 10).contiguous(memory_format=layout)
    out, gradient, _ = results(qkv, table_bias(4, 2), 4, 2, "cpu")
    assert out.is_contiguous(memory_format=layout)
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("make_bias", BIASES)
def test_scores_of_any_size(native: ModuleType, make_bias: type[Bias]) -> None:
    """Scores in the hundreds: all weight on one token, and sums of powers that would overflow without the maximum."""
    qkv, bias = 30 * normal(1, 2 * 3 * 4, 9, 17), make_bias(8, 2)
    exact = results(qkv.double(), in_double(bias), 8, 2, "naive")
    ours = results(qkv, bias, 8, 2, "cpu")
    plain = results(qkv, bias, 8, 2, "naive")
    for expected, reference, value in zip(exact, plain, ours, strict=True):
        assert value.isfinite().all()
        ulp = torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert max_error(value, expected) <= 2 * max_error(reference, expected) + 16 * ulp


@pytest.mark.parametrize("make_bias", BIASES)
@pytest.mark.parametrize("scale", [1, 30])
def test_no_number_reaches_all_that_attend_to_it(native: ModuleType, scale: int, make_bias: type[Bias]) -> None:
    """Whether the softmax needs its maximum or the scores are small; and no other window."""
    qkv, bias = scale * normal(1, 2 * 3 * 4, 8, 16), make_bias(8, 2)
    clean = window_attention(qkv, bias, window=8, heads=2, backend="cpu")
    qkv[0, 8, 3, 4] = float("nan")  # of a key
    out = window_attention(qkv, bias, window=8, heads=2, backend="cpu")
    assert out[:, :4, :, :8].isnan().all()
    assert torch.equal(out[:, 4:], clean[:, 4:])
    assert torch.equal(out[..., 8:], clean[..., 8:])


def test_bounded_scores_beside_others(native: ModuleType) -> None:
    """Only some pairs of queries need the maximum; the results do not show which."""
    qkv, bias = normal(1, 3 * 16, 8, 8), table_bias(8, 1)
    qkv[:, :16, 4:] *= 40
    exact = results(qkv.double(), in_double(bias), 8, 1, "naive")
    plain = results(qkv, bias, 8, 1, "naive")
    for expected, reference, value in zip(exact, plain, results(qkv, bias, 8, 1, "cpu"), strict=True):
        ulp = torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert max_error(value, expected) <= 2 * max_error(reference, expected) + 8 * ulp


def test_large_biases_of_either_sign(native: ModuleType) -> None:
    """Lanes of a vector without a query read any part of the table: they must not reach the gradients."""
    qkv, bias = normal(1, 3 * 4, 7, 5), 300 * normal(1, 13**2, seed=1)
    for value in results(qkv, bias, 7, 1, "cpu"):
        assert value.isfinite().all()


def test_gradients_do_not_depend_on_the_threads(native: ModuleType) -> None:
    qkv, bias = normal(1, 2 * 3 * 4, 19, 22), table_bias(4, 2)
    before = torch.get_num_threads()
    try:
        of_threads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            of_threads.append(results(qkv, bias, 4, 2, "cpu"))
    finally:
        torch.set_num_threads(before)
    for others in of_threads[1:]:
        assert all(map(torch.equal, others, of_threads[0]))


@pytest.mark.parametrize("make_bias", BIASES)
def test_what_the_operator_registers(native: ModuleType, make_bias: type[Bias]) -> None:
    """Its schema, its shapes without data, and its gradients under tracing, as PyTorch itself checks them."""
    for layout in LAYOUTS:
        qkv = normal(1, 24, 5, 9).contiguous(memory_format=layout).requires_grad_()
        bias = make_bias(4, 2)
        first, second = (bias, None) if isinstance(bias, Tensor) else bias
        leaves = [None if part is None else part.requires_grad_() for part in (first, second)]
        # The statistics are for the backward alone, which has no gradient of its own
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.esc_arch.window_attention_cpu.default, (qkv, *leaves, 4, 2), test_utils=checks)


@pytest.mark.parametrize("make_bias", BIASES)
def test_compiled_and_checkpointed(native: ModuleType, make_bias: type[Bias]) -> None:
    bias = make_bias(4, 2)
    qkv = normal(1, 24, 5, 9).contiguous(memory_format=torch.channels_last)

    def attend(qkv: Tensor, *parts: Tensor) -> Tensor:
        given: Bias = parts[0] if len(parts) == 1 else (parts[0], parts[1])
        return 2 * window_attention(2 * qkv, given, window=4, heads=2, backend="cpu")

    def gradients(function: object) -> list[Tensor]:
        parts = (bias,) if isinstance(bias, Tensor) else bias
        leaves = [part.detach().clone().requires_grad_() for part in (qkv, *parts)]
        out = function(*leaves)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    expected = gradients(attend)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for values in (gradients(compiled), gradients(lambda *leaves: checkpoint(attend, *leaves, use_reentrant=False))):
        assert all(map(torch.equal, values, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps(native: ModuleType, dtype: torch.dtype) -> None:
    """Computed in float32, so the only errors are those of rounding the results."""
    qkv, bias = normal(1, 24, 5, 9).to(dtype), table_bias(4, 2)
    exact = results(qkv.double(), in_double(bias), 4, 2, "naive")
    ours = results(qkv, bias, 4, 2, "cpu")
    assert [value.dtype for value in ours] == [dtype, dtype, torch.float32]
    for expected, value in zip(exact, ours, strict=True):
        assert max_error(value, expected) <= 2 * torch.finfo(dtype).eps * expected.abs().max().item()


def test_only_the_gradients_wanted(native: ModuleType) -> None:
    qkv, bias = normal(1, 24, 5, 9), table_bias(4, 2)
    assert not window_attention(qkv, bias, window=4, heads=2, backend="cpu").requires_grad
    table = torch.nn.Parameter(bias)
    out = window_attention(qkv, table, window=4, heads=2, backend="cpu")
    (gradient,) = torch.autograd.grad(out, table, normal(*out.shape, seed=5))
    assert torch.equal(gradient, results(qkv, bias, 4, 2, "cpu")[2])


def test_auto_takes_it_when_it_is_built(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, bias = normal(1, 24, 5, 9), table_bias(4, 2)
    ours, auto = (window_attention(qkv, bias, window=4, heads=2, backend=name) for name in ("cpu", "auto"))
    assert torch.equal(ours, auto)
    monkeypatch.setattr(operators._State, "reasons", [operators.NOT_BUILT])
    without = window_attention(qkv, bias, window=4, heads=2)
    assert torch.equal(without, window_attention(qkv, bias, window=4, heads=2, backend="sdpa"))


def test_what_it_refuses(native: ModuleType) -> None:
    table = torch.zeros(2, 49)
    with pytest.raises(RuntimeError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        window_attention(torch.zeros(1, 24, 4, 4).double(), table, window=4, heads=2, backend="cpu")
    with pytest.raises(RuntimeError, match="it runs on cpu, not on meta"):
        window_attention(torch.zeros(1, 24, 4, 4, device="meta"), table, window=4, heads=2, backend="cpu")
    with pytest.raises(RuntimeError, match="it takes windows up to 96, not 97"):
        window_attention(torch.zeros(1, 3, 4, 4), torch.zeros(1, 193**2), window=97, heads=1, backend="cpu")


def test_export_does_without_it(native: ModuleType) -> None:
    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return window_attention(qkv, torch.zeros(2, 49), window=4, heads=2)

    program = torch.export.export(Attend(), (normal(1, 24, 5, 9),))
    assert not any("esc_arch" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("qkv", "bias", "keys", "message"),
    [
        (torch.zeros(1, 25, 4, 4), torch.zeros(2, 49), None, r"qkv must be \(B, 3C, H, W\)"),
        (torch.zeros(0, 24, 4, 4), torch.zeros(2, 49), None, "and not empty"),
        (torch.zeros(1, 24, 4, 4).double(), torch.zeros(2, 49), None, "must be float32"),
        (torch.zeros(1, 24, 4, 4), torch.zeros(2, 48), None, "the bias table must be"),
        (torch.zeros(1, 24, 4, 4), torch.zeros(2, 16, 3), torch.zeros(2, 16, 4), "both factors of the bias must be"),
    ],
)
def test_operator_checks_what_it_is_given(
    native: ModuleType, qkv: Tensor, bias: Tensor, keys: Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esc_arch.window_attention_cpu(qkv, bias, keys, 4, 2)


def test_backward_checks_what_it_is_given(native: ModuleType) -> None:
    qkv, table = normal(1, 24, 4, 4), torch.zeros(2, 49)
    out, statistics = torch.ops.esc_arch.window_attention_cpu(qkv, table, None, 4, 2)
    with pytest.raises(RuntimeError, match="the gradient must be float32 and like the output"):
        torch.ops.esc_arch.window_attention_backward_cpu(out[:, :4], qkv, table, None, out, statistics, 4, 2)
