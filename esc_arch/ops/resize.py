"""Resizing images as MATLAB's `imresize` does: bicubic, with antialiasing when made smaller.

The LR images of super-resolution benchmarks are made this way. Each side is resized by a product with a matrix,
so that a batch takes two matrix products, on any device and at any real scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["matlab_resize", "resize_matrix", "round_to_8bit", "scale_pair", "scaled_size"]

#: Width of the bicubic kernel (pixels of the smaller image).
SUPPORT = 4


def matlab_resize(
    x: Tensor, size: tuple[int, int] | None = None, scale: float | Sequence[float] | None = None
) -> Tensor:
    """Resize images as MATLAB's `imresize(x, size)` or `imresize(x, scale)`, without rounding to 8 bit.

    On GPUs whose matrix products are set to TF32 the result has the precision of TF32.

    Args:
        x: (B, C, H, W), of a floating-point type, which the result keeps.
        size: (H', W') of the result; without, it is the next whole number of pixels from H * scale and W * scale on.
        scale: one number, or those of height and width; without, it is size over the size of `x`.

    Returns:
        (B, C, H', W').

    Raises:
        ValueError: neither size nor scale is given, one is not positive, or `x` is not of a floating-point type.
    """
    if not x.is_floating_point():
        raise ValueError(f"the image is of {x.dtype}; it must be of a floating-point type, such as torch.float32.")
    if size is None and scale is None:
        raise ValueError("neither size nor scale is given; one is needed.")
    scales = (None, None) if scale is None else scale_pair(scale)
    if size is None:
        # (35 * 0.2 may come out a little above the whole number it is)
        sides = [math.ceil(side * each - 1e-9) for side, each in zip(x.shape[-2:], scales, strict=True) if each]
    else:
        sides = list(size)
    rows, columns = (
        resize_matrix(before, after, each, dtype=x.dtype, device=x.device)
        for before, after, each in zip(x.shape[-2:], sides, scales, strict=True)
    )
    return rows @ x @ columns.T


@lru_cache(maxsize=32)
def resize_matrix(
    in_size: int,
    out_size: int,
    scale: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The matrix (out_size, in_size) that resizes one side; the last ones asked for are kept, so do not change it.

    Row i holds the cubic kernel (a = -0.5) around where the centre of pixel i falls in the input, widened by
    1 / scale when scale < 1, its weights made to sum to 1. Pixels beyond the ends are those mirrored at them, to and
    fro as often as needed, so that any size works.

    Args:
        scale: pixels of the output to one of the input; out_size / in_size if not given.

    Raises:
        ValueError: a size or the scale is not positive.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"{in_size} pixels cannot be resized to {out_size}; both must be at least 1.")
    if scale is None:
        scale = out_size / in_size
    elif not (0 < scale < math.inf):
        raise ValueError(f"scale is {scale}; it must be a number above 0.")
    shrinking = min(scale, 1)  # the kernel is as wide as in the smaller of both images
    width = SUPPORT / shrinking
    centres = (np.arange(out_size) + 0.5) / scale - 0.5
    first = np.floor(centres - width / 2).astype(np.int64)
    index = first[:, None] + np.arange(math.ceil(width) + 2)
    weights = _cubic((centres[:, None] - index) * shrinking)
    weights /= weights.sum(axis=1, keepdims=True)
    index %= 2 * in_size
    index = np.minimum(index, 2 * in_size - 1 - index)
    matrix = np.zeros((out_size, in_size))
    np.add.at(matrix, (np.arange(out_size)[:, None], index), weights)
    with torch.inference_mode(False):  # what is kept may serve training later
        return torch.from_numpy(matrix).to(device, dtype)


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel with a = -0.5, of the distance in pixels."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def round_to_8bit(x: Tensor) -> Tensor:
    """Images in 0 .. 1 with the values that an 8-bit file keeps: clipped, and rounded to whole 255ths."""
    return x.clamp(0, 1).mul(255).round().div(255)


def scale_pair(scale: float | Sequence[float]) -> tuple[float, float]:
    """A scale, or the two of height and width, as two.

    Raises:
        ValueError: not one or two finite numbers above 0.
    """
    numbers = tuple(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else (scale, scale)
    if len(numbers) != 2 or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers
    ):
        raise ValueError(f"scale is {scale!r}; it must be a number above 0, or two: of height and of width.")
    return numbers[0], numbers[1]


def scaled_size(size: Sequence[int], scale: float | Sequence[float]) -> tuple[int, int]:
    """Height and width of an image of `size` enlarged by `scale`: rounded to whole pixels, at least one.

    Raises:
        ValueError: see `scale_pair`.
    """
    # Whole scales by whole numbers: while exporting, the size may be a symbol
    height, width = (
        side * int(each) if each == int(each) else max(1, round(side * each))
        for side, each in zip(size, scale_pair(scale), strict=True)
    )
    return height, width
