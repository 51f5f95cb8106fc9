"""ConvAttn's arithmetic: the symmetry of the large kernel, and one kernel for each image."""

from __future__ import annotations

import pytest
import torch
from networks import DEVICES, average_of_symmetries, loop_conv_attention, max_error, normal
from torch import Tensor

from esc_arch.ops.conv_attn import conv_attention, symmetrise
from esc_arch.ops.conv_attn.api import CONV_ATTN

FLOAT64 = {"dtype": torch.float64}


def count_distinct(taps: Tensor) -> int:
    return len(set(taps.flatten().tolist()))


@pytest.mark.parametrize(("side", "distinct"), [(1, 1), (3, 3), (5, 6), (13, 28)])
def test_symmetrised_kernel_has_few_distinct_taps(side: int, distinct: int) -> None:
    kernel = symmetrise(normal(4, 4, side, side))
    counts = {count_distinct(taps) for taps in kernel.flatten(0, 1)}
    assert counts == {distinct}  # of side * side; more would be a symmetry missed, fewer one too many


@pytest.mark.parametrize("side", [1, 3, 5, 13])
def test_symmetrise_is_the_average_over_the_square(side: int) -> None:
    kernel = normal(3, 2, side, side, **FLOAT64)
    assert max_error(symmetrise(kernel), average_of_symmetries(kernel)) < 1e-15 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_symmetrise_is_idempotent_to_the_bit(dtype: torch.dtype) -> None:
    once = symmetrise(normal(4, 4, 13, 13, dtype=dtype))
    assert torch.equal(symmetrise(once), once)


def test_symmetrise_leaves_its_input_alone() -> None:
    kernel = normal(2, 2, 5, 5)
    before = kernel.clone()
    symmetrise(kernel)
    assert torch.equal(kernel, before)


def test_gradient_of_symmetrise_is_symmetric() -> None:
    kernel = normal(4, 4, 13, 13, **FLOAT64).requires_grad_()
    cotangent = normal(4, 4, 13, 13, seed=3, **FLOAT64)
    (gradient,) = torch.autograd.grad(symmetrise(kernel), kernel, cotangent)
    for same in (gradient.flip(-1), gradient.flip(-2), gradient.transpose(-2, -1)):
        assert max_error(gradient, same) < 1e-14
    assert max_error(gradient, average_of_symmetries(cotangent)) < 1e-14  # averaging is its own adjoint


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 9, 14), (3, 4, 1, 7), (3, 4, 20, 13)])
@pytest.mark.parametrize("sides", [(13, 3), (5, 1), (1, 3)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_conv_attention_is_a_convolution_per_image(
    backend: str, shape: tuple[int, int, int, int], sides: tuple[int, int], device: str
) -> None:
    batch, channels = shape[:2]
    x = normal(*shape, **FLOAT64)
    large = normal(channels, channels, sides[0], sides[0], seed=3, **FLOAT64)
    dynamic = normal(batch, channels, sides[1], sides[1], seed=4, **FLOAT64)
    out = conv_attention(x.to(device), large.to(device), dynamic.to(device), backend=backend)
    assert max_error(out, loop_conv_attention(x, large, dynamic)) < 1e-11


def test_conv_attention_of_a_view_and_of_channels_last() -> None:
    x, large, dynamic = normal(2, 6, 9, 11), normal(4, 4, 13, 13, seed=3), normal(2, 4, 3, 3, seed=4)
    expected = conv_attention(x[:, :4].contiguous(), large, dynamic)
    before = x.clone()
    assert max_error(conv_attention(x[:, :4], large, dynamic), expected) < 1e-4
    channels_last = x.contiguous(memory_format=torch.channels_last)[:, :4]
    assert max_error(conv_attention(channels_last, large, dynamic), expected) < 1e-4
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["reference"])
def test_gradients_of_conv_attention(backend: str) -> None:
    inputs = (normal(2, 2, 3, 4, **FLOAT64), normal(2, 2, 5, 5, seed=3, **FLOAT64), normal(2, 2, 3, 3, **FLOAT64))
    torch.autograd.gradcheck(
        lambda *values: conv_attention(*values, backend=backend), [value.requires_grad_() for value in inputs]
    )


def test_every_backend_is_tested_here_or_by_itself() -> None:
    assert {"reference", "cpu", "triton"} <= set(CONV_ATTN.backends)


def test_an_unknown_backend() -> None:
    x, large, dynamic = normal(1, 2, 3, 4), normal(2, 2, 5, 5), normal(1, 2, 3, 3)
    with pytest.raises(ValueError, match="ConvAttn backend 'fft' is not known; allowed: auto, reference, cpu"):
        conv_attention(x, large, dynamic, backend="fft")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 2, 5, 5), (1, 2, 3, 3)), r"x has shape \(2, 3, 4\); it must be \(B, C, H, W\)"),
        (
            ((1, 2, 3, 4), (2, 3, 5, 5), (1, 2, 3, 3)),
            r"large kernel has shape .* must be \(C = 2, C = 2, K = 5, K = 5\)",
        ),
        (((1, 2, 3, 4), (2, 2, 4, 4), (1, 2, 3, 3)), r"kernel has shape \(2, 2, 4, 4\); its sides must be odd"),
        (
            ((1, 2, 3, 4), (2, 2, 5, 5), (2, 2, 3, 3)),
            r"dynamic kernel has shape .* must be \(B = 1, C = 2, k = 3, k = 3\)",
        ),
        (((1, 2, 3, 4), (2, 2, 5, 5), (1, 2, 3, 1)), r"dynamic kernel has shape \(1, 2, 3, 1\); it must"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_attention(*(normal(*shape) for shape in shapes))
