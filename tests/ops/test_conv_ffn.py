"""ConvFFN: the formula pixel by pixel, the choice of a backend, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from networks import max_error, normal
from torch import Tensor

from esc_arch.modules import ConvFFN
from esc_arch.ops import operation
from esc_arch.ops.conv_ffn import conv_ffn


def arguments(*size: int, hidden: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A map of `size` and parameters that keep every step's numbers near 1."""
    channels = size[1]
    return (
        normal(*size, seed=1, dtype=dtype),
        normal(hidden, channels, 1, 1, seed=2, dtype=dtype) * 1.5 * channels**-0.5,
        0.3 * normal(hidden, seed=3, dtype=dtype),
        0.5 * normal(hidden, 1, 3, 3, seed=4, dtype=dtype),
        0.3 * normal(hidden, seed=5, dtype=dtype),
        normal(channels, hidden, 1, 1, seed=6, dtype=dtype) * hidden**-0.5,
        0.3 * normal(channels, seed=7, dtype=dtype),
    )


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def by_pixels(x: Tensor, *parameters: Tensor) -> Tensor:
    """The formula, a pixel at a time."""
    expand, expand_bias, taps, taps_bias, reduce, reduce_bias = (parameter.squeeze() for parameter in parameters)
    batch, _, height, width = x.shape
    out = torch.empty_like(x)
    for b in range(batch):
        hidden = {
            (row, column): gelu(expand @ x[b, :, row, column] + expand_bias)
            for row in range(height)
            for column in range(width)
        }
        for (row, column), centre in hidden.items():
            around = sum(
                taps[:, i, j] * hidden[row + i - 1, column + j - 1]
                for i in range(3)
                for j in range(3)
                if (row + i - 1, column + j - 1) in hidden
            )
            out[b, :, row, column] = reduce @ (gelu(around + taps_bias) + centre) + reduce_bias
    return out


@pytest.mark.parametrize("size", [(1, 4, 1, 1), (2, 3, 4, 5)])
def test_reference_is_the_formula(size: tuple[int, ...]) -> None:
    values = arguments(*size, dtype=torch.float64)
    assert max_error(conv_ffn(*values, backend="reference"), by_pixels(*values)) < 1e-13


def test_the_layer_hands_over_its_parameters() -> None:
    values = arguments(1, 8, 4, 5, hidden=10, dtype=torch.float64)
    layer = ConvFFN(8, 1.25).double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values[1:], strict=True):
            parameter.copy_(value)
    assert max_error(layer(values[0]), by_pixels(*values)) < 1e-13


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'fast' is not known; allowed: auto, reference, cpu \(in any case\)"):
        conv_ffn(*arguments(1, 4, 2, 2), backend="fast")


@pytest.mark.parametrize(
    ("place", "cut", "message"),
    [
        (0, 0, r"x has shape \(4, 2, 2\); it must be \(B, C, H, W\)\."),
        (2, slice(5), r"proj_bias has shape \(5,\); it must be \(M = 6\)\."),
        (5, slice(3), r"aggr_weight has shape \(3, 6, 1, 1\); it must be \(C = 4, M = 6, 1, 1\)\."),
    ],
)
def test_shapes_that_do_not_fit(place: int, cut: int | slice, message: str) -> None:
    values = list(arguments(1, 4, 2, 2))
    values[place] = values[place][cut]
    with pytest.raises(ValueError, match=message):
        conv_ffn(*values)


def test_cpu_by_name_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation.cpu, "build_by_name", lambda: None)
    with pytest.raises(RuntimeError, match=r"it runs on cpu, not on meta; it takes float32, not torch\.float64\."):
        conv_ffn(*(value.double().to("meta") for value in arguments(1, 4, 2, 2)), backend="cpu")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast asks for half precision, and it computes in float32"),
    ):
        conv_ffn(*arguments(1, 4, 2, 2), backend="cpu")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(RuntimeError, match="an exported network keeps the plain formula"):
        conv_ffn(*arguments(1, 4, 2, 2), backend="cpu")
