"""The C++ operator of a whole attention layer, held to the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import max_error, normal
from test_cpu_attention import factor_bias, table_bias
from torch import Tensor

from esc_arch.ops import cpu as operators
from esc_arch.ops.window_attention import Bias, window_attention, window_attention_fused
from esc_arch.ops.window_attention.api import Norm, Projection

pytestmark = pytest.mark.usefixtures("native")

#: Window, heads, head dimension, batch, height, width: of fewer windows than threads and of many, exact and odd.
CASES = [
    (4, 1, 4, 2, 3, 9),
    (4, 2, 16, 1, 1, 2),
    (7, 3, 20, 1, 5, 16),
    (8, 4, 16, 2, 20, 27),
    (8, 1, 5, 3, 40, 41),
    (19, 2, 11, 1, 20, 30),
    (32, 4, 16, 1, 33, 40),
    (32, 2, 16, 2, 7, 50),
]
EPS = 1e-6


def channels_last(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def parameters(channels: int) -> dict[str, Any]:
    """The projections, such that what they put out is about as large as what they are given, and the norm."""
    return {
        "to_qkv": (normal(3 * channels, channels, 1, 1, seed=11) / channels**0.5, normal(3 * channels, seed=12)),
        "to_out": (normal(channels, channels, 1, 1, seed=13) / channels**0.5, normal(channels, seed=14)),
        "norm": (1 + normal(channels, seed=15) / 4, normal(channels, seed=16), EPS),
    }


def formula(
    x: Tensor,
    to_qkv: Projection,
    bias: Bias,
    to_out: Projection,
    *,
    window: int,
    heads: int,
    norm: Norm | None = None,
    residual: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) else value

    x, bias = cast(x), cast(bias) if isinstance(bias, Tensor) else (cast(bias[0]), cast(bias[1]))
    normed = x
    if norm is not None:
        weight, shift, eps = map(cast, norm)
        normed = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, shift, eps).permute(0, 3, 1, 2)
    qkv = F.conv2d(normed, *map(cast, to_qkv))
    out = F.conv2d(window_attention(qkv, bias, window=window, heads=heads, backend="naive"), *map(cast, to_out))
    return x + out if residual else out


def assert_within_budget(value: Tensor | None, *inputs: Any, **options: Any) -> None:
    """An error at most twice that of the formula in float32, and of some roundings of the largest value."""
    truth = formula(*inputs, **options)
    plain = formula(*inputs, **options, dtype=torch.float32)
    assert value is not None
    rounding = 8 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert max_error(value, truth) <= 2 * max_error(plain, truth) + rounding
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert value.shape == truth.shape


@pytest.mark.parametrize("make_bias", [pytest.param(table_bias, id="table"), pytest.param(factor_bias, id="factors")])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[int, ...], make_bias: Callable[[int, int], Bias]) -> None:
    window, heads, dim, batch, height, width = case
    given = parameters(heads * dim)
    inputs = (channels_last(batch, heads * dim, height, width), given["to_qkv"], make_bias(window, heads))
    options = {"window": window, "heads": heads, "norm": given["norm"], "residual": True}
    with torch.no_grad():
        assert_within_budget(
            window_attention_fused(*inputs, given["to_out"], **options), *inputs, given["to_out"], **options
        )


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_with_and_without_its_parts(residual: bool, normed: bool, biased: bool) -> None:
    given = parameters(24)
    to_qkv, to_out = ((weight, bias if biased else None) for weight, bias in (given["to_qkv"], given["to_out"]))
    inputs = (channels_last(1, 24, 9, 13), to_qkv, table_bias(4, 2), to_out)
    options = {"window": 4, "heads": 2, "norm": given["norm"] if normed else None, "residual": residual}
    assert_within_budget(window_attention_fused(*inputs, **options), *inputs, **options)


def test_scores_of_any_size() -> None:
    """Far from zero the softmax needs its maximum, and some windows here are there and others are not."""
    given = parameters(24)
    weight, shift = given["to_qkv"]
    x = channels_last(1, 24, 8, 16)
    x[..., :8] *= 0.1
    inputs = (x, (5 * weight, shift), table_bias(8, 2), given["to_out"])
    assert_within_budget(window_attention_fused(*inputs, window=8, heads=2), *inputs, window=8, heads=2)


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (19, 41)])
def test_the_same_to_the_bit_with_any_number_of_threads(size: tuple[int, int]) -> None:
    given = parameters(24)
    x = channels_last(1, 24, *size)
    before = torch.get_num_threads()
    try:
        of_threads = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            of_threads.append(
                window_attention_fused(x, given["to_qkv"], table_bias(8, 2), given["to_out"], window=8, heads=2)
            )
    finally:
        torch.set_num_threads(before)
    for others in of_threads[1:]:
        assert torch.equal(others, of_threads[0])


def test_strided_maps_and_weights_and_no_input_modified() -> None:
    given = parameters(6)
    whole = channels_last(2, 8, 9, 20)
    before = whole.clone()
    x = whole[:, :6, :, ::2]
    weight, shift = given["to_qkv"]
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    bias = normal(49, 2, seed=3).T
    inputs = (x, (turned, shift.repeat_interleave(2)[::2]), bias, given["to_out"])
    options = {"window": 4, "heads": 2, "norm": given["norm"], "residual": True}
    assert_within_budget(window_attention_fused(*inputs, **options), *inputs, **options)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("channels", [8, 24])
def test_no_number_stays_within_its_window(channels: int) -> None:
    """A pixel that is none spoils all that attends to it, and nothing else."""
    given = parameters(channels)
    x = channels_last(1, channels, 8, 16)
    options = {"window": 8, "heads": 2, "norm": given["norm"], "residual": True}
    clean = window_attention_fused(x, given["to_qkv"], table_bias(8, 2), given["to_out"], **options)
    x[0, 1, 3, 4] = float("nan")
    out = window_attention_fused(x, given["to_qkv"], table_bias(8, 2), given["to_out"], **options)
    assert out is not None
    assert clean is not None
    assert out[..., :8].isnan().all()
    assert torch.equal(out[..., 8:], clean[..., 8:])


def test_an_empty_batch() -> None:
    given = parameters(8)
    x = torch.empty(0, 8, 5, 6, memory_format=torch.channels_last)
    out = window_attention_fused(x, given["to_qkv"], table_bias(4, 2), given["to_out"], window=4, heads=2)
    assert out is not None
    assert out.shape == x.shape


def test_where_it_is_left_to_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parameters(8)
    x, table = channels_last(1, 8, 5, 6), table_bias(4, 2)

    def runs(x: Tensor = x, to_qkv: Projection = given["to_qkv"], table: Tensor = table, backend: str = "auto") -> bool:
        options = {"window": 4, "heads": 2, "norm": given["norm"], "backend": backend}
        return window_attention_fused(x, to_qkv, table, given["to_out"], **options) is not None

    assert runs()
    assert runs(backend="CPP")
    for name in ("naive", "sdpa", "flex", "flash", "triton"):
        assert not runs(backend=name)
    weight, shift = given["to_qkv"]
    assert not runs(x=x.contiguous())
    assert not runs(x=x.double())
    assert not runs(x=x.to("meta"))
    assert not runs(to_qkv=(weight.double(), shift))
    assert not runs(to_qkv=(weight.clone().requires_grad_(), shift))
    assert not runs(table=table.clone().requires_grad_())
    with torch.no_grad():
        assert runs(table=table.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs()
    monkeypatch.setattr(operators._State, "reasons", [operators.NOT_BUILT])
    assert not runs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 5, 6)}, r"x has shape \(8, 5, 6\); it must be \(B, C, H, W\), C a multiple of 2 heads"),
        ({"bias": torch.zeros(2, 48)}, r"the bias table has shape \(2, 48\)"),
        ({"window": 0}, "window is 0 and heads is 2; both must be at least 1"),
        ({"backend": "fast"}, "attn_type 'fast' is not known"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    given = {"x": channels_last(1, 8, 5, 6), "bias": table_bias(4, 2), "window": 4, "heads": 2, **parameters(8)}
    with pytest.raises(ValueError, match=message):
        window_attention_fused(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(1, 9, 5, 6)}, "C a multiple of the heads"),
        ({0: torch.zeros(1, 8, 5, 6).double()}, "and float32"),
        ({1: None}, "a weight and a bias, or neither"),
        ({1: torch.zeros(7)}, r"the norm's weight and bias must be \(C\)"),
        ({4: torch.zeros(16, 8, 1, 1)}, r"the weights must be \(3C, C, 1, 1\) and \(C, C, 1, 1\)"),
        ({9: torch.zeros(9)}, "the weights must be"),
        ({6: torch.zeros(2, 48)}, "the bias table must be"),
        ({6: torch.zeros(2, 49).double()}, "the bias must be float32 and contiguous"),
    ],
)
def test_operator_checks_what_it_is_given(changes: dict[int, Any], message: str) -> None:
    given = parameters(8)
    weight, shift, eps = given["norm"]
    arguments: list[Any] = [
        *(channels_last(1, 8, 5, 6), weight, shift, eps, *given["to_qkv"]),
        *(table_bias(4, 2), None, *given["to_out"], 4, 2, True),
    ]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esc_arch.window_attention_fused_cpu(*arguments)


def test_registered_as_pytorch_wants_and_compiled(native: ModuleType) -> None:
    given = parameters(8)
    x, table = channels_last(2, 8, 5, 6), table_bias(4, 2)
    arguments = (x, *given["norm"], *given["to_qkv"], table, None, *given["to_out"], 4, 2, True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.esc_arch.window_attention_fused_cpu.default, arguments, test_utils=checks)

    def layer(x: Tensor) -> Tensor | None:
        return window_attention_fused(
            2 * x, given["to_qkv"], table, given["to_out"], window=4, heads=2, norm=given["norm"]
        )

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), layer(x)
    assert out is not None
    assert expected is not None
    assert torch.equal(out, expected)
