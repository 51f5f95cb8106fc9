"""Resizing against BasicSR's function, and against MATLAB's algorithm written out pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from basicsr.utils.matlab_functions import imresize
from torch import Tensor

from esc_arch.ops.resize import matlab_resize, resize_matrix, round_to_8bit, scale_pair, scaled_size


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_line(line: list[float], out: int, scale: float) -> list[float]:
    """As in MATLAB's documentation: positions count from 1, the line is mirrored at its ends."""
    mirrored = [*line, *reversed(line)]
    h = (lambda x: scale * cubic(scale * x)) if scale < 1 else cubic
    reach = 2 / min(scale, 1) + 2
    result = []
    for i in range(1, out + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        taps = range(math.floor(u - reach), math.ceil(u + reach) + 1)
        weights = [h(u - k) for k in taps]
        values = [mirrored[(k - 1) % len(mirrored)] for k in taps]
        result.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return result


def resize_plainly(image: Tensor, size: Sequence[int], scales: Sequence[float]) -> Tensor:
    columns = image.new_tensor([resize_line(column.tolist(), size[0], scales[0]) for column in image.T]).T
    return image.new_tensor([resize_line(row.tolist(), size[1], scales[1]) for row in columns])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_basicsr(scale: int) -> None:
    image = torch.rand(3, 24 * scale, 12 * scale, generator=torch.Generator().manual_seed(scale))
    difference = matlab_resize(image[None], scale=1 / scale)[0] - imresize(image, 1 / scale)
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (12, 9)])
@pytest.mark.parametrize("scale", [0.11, 0.4, 1 / 2.5, 1.0, 1.7, 3.0])
def test_equals_the_algorithm_written_out(shape: tuple[int, int], scale: float) -> None:
    image = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = [math.ceil(n * scale - 1e-9) for n in shape]
    expected = resize_plainly(image, size, (scale, scale))
    assert torch.allclose(matlab_resize(image[None, None], scale=scale)[0, 0], expected, atol=1e-12)


def test_of_a_size_the_scale_is_the_quotient() -> None:
    image = torch.rand(10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = resize_plainly(image, (4, 9), (4 / 10, 9 / 7))
    assert torch.allclose(matlab_resize(image[None, None], (4, 9))[0, 0], expected, atol=1e-6)


def test_scales_of_height_and_width() -> None:
    image = torch.rand(2, 3, 12, 10)
    assert matlab_resize(image, scale=(1 / 3, 1 / 2)).shape == (2, 3, 4, 5)
    both = matlab_resize(matlab_resize(image, scale=(1 / 3, 1)), scale=[1, 1 / 2])
    assert torch.allclose(matlab_resize(image, scale=(1 / 3, 1 / 2)), both, atol=1e-6)


def test_sizes_are_not_rounded_up_by_inexact_products() -> None:
    assert matlab_resize(torch.rand(1, 1, 35, 45), scale=(1 / 1.4, 0.2)).shape == (1, 1, 25, 9)


def test_batches_layouts_and_types() -> None:
    batch = torch.rand(4, 3, 17, 11, dtype=torch.float64)
    expected = matlab_resize(batch, (7, 5))
    assert expected.dtype == torch.float64
    for index in range(len(batch)):
        assert torch.allclose(matlab_resize(batch[index : index + 1], (7, 5)), expected[index : index + 1])
    assert torch.allclose(matlab_resize(batch.contiguous(memory_format=torch.channels_last), (7, 5)), expected)
    assert torch.allclose(matlab_resize(batch.transpose(2, 3), (5, 7)).transpose(2, 3), expected)


def test_the_same_size_is_the_same_image() -> None:
    image = torch.rand(1, 3, 9, 6)
    assert torch.equal(matlab_resize(image, (9, 6)), image)


def test_kept_matrices_serve_training_after_inference() -> None:
    resize_matrix.cache_clear()
    with torch.inference_mode():
        matlab_resize(torch.rand(1, 1, 6, 6), (3, 3))
    image = torch.rand(1, 1, 6, 6, requires_grad=True)
    matlab_resize(image, (3, 3)).sum().backward()
    assert image.grad is not None
    assert resize_matrix.cache_info().hits > 0


def test_errors() -> None:
    image = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"of torch\.uint8; it must be of a floating-point type"):
        matlab_resize(image.byte(), (2, 2))
    with pytest.raises(ValueError, match="neither size nor scale is given"):
        matlab_resize(image)
    with pytest.raises(ValueError, match="4 pixels cannot be resized to 0"):
        matlab_resize(image, (0, 2))
    with pytest.raises(ValueError, match="scale is -1; it must be a number above 0"):
        resize_matrix(4, 2, -1)


@pytest.mark.parametrize("scale", [0, -2, float("nan"), float("inf"), (1, 2, 3), [2], "2", None, True, (2, "3")])
def test_wrong_scales(scale: object) -> None:
    with pytest.raises(ValueError, match="it must be a number above 0, or two: of height and of width"):
        scale_pair(scale)  # type: ignore[arg-type]


def test_scaled_size() -> None:
    assert scaled_size((10, 7), 2) == (20, 14)
    assert scaled_size((10, 7), 2.5) == (25, 18)
    assert scaled_size((10, 7), [1.0, 3.3]) == (10, 23)
    assert scaled_size((1, 3), 0.2) == (1, 1)


def test_round_to_8bit() -> None:
    given = torch.tensor([-0.1, 0.0, 0.4999 / 255, 100.4 / 255, 1.0, 1.2])
    assert torch.equal(round_to_8bit(given) * 255, torch.tensor([0.0, 0, 0, 100, 255, 255]))
