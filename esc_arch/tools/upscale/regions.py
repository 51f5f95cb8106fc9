"""Rectangles of maps, how maps are cut into them, and pictures read a rectangle at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.errors import UserError

__all__ = ["Picture", "Region", "cuts", "grid"]


class Region(NamedTuple):
    """Rows top .. bottom - 1 and columns left .. right - 1 of a map."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def area(self) -> int:
        return self.height * self.width

    def grown(self, margin: int, height: int, width: int) -> Region:
        """With a margin on all sides, as far as a map of this size has it."""
        return Region(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, height),
            min(self.right + margin, width),
        )

    def times(self, factor: int) -> Region:
        """The same of a map that is larger by a whole number."""
        return Region(*(edge * factor for edge in self))

    def of(self, outer: Region, x: Tensor) -> Tensor:
        """This part of x (..., H, W), which shows `outer`."""
        return x[..., self.top - outer.top : self.bottom - outer.top, self.left - outer.left : self.right - outer.left]

    def halves(self, align: int) -> tuple[Region, Region] | None:
        """Cut across the longer side, at a multiple of `align` from its beginning; None where that cannot be."""
        if max(self.height, self.width) < 2 * align:
            return None
        if self.height >= self.width:
            middle = self.top + self.height // (2 * align) * align
            return self._replace(bottom=middle), self._replace(top=middle)
        middle = self.left + self.width // (2 * align) * align
        return self._replace(right=middle), self._replace(left=middle)


def cuts(length: int, most: int, align: int = 1) -> list[tuple[int, int]]:
    """Cut 0 .. length into nearly equal parts, at multiples of `align`.

    A remainder of less than `align` at the end belongs to the last part and is not counted: attention reflects the map
    there, and what it reflects has to be in the same part.

    Args:
        most: the longest part, at least `align`.
    """
    units = max(length // align, 1)
    count = -(-units // max(most // align, 1))
    edges = [units * index // count * align for index in range(count)] + [length]
    return list(pairwise(edges))


def grid(height: int, width: int, most: int, align: int = 1) -> Iterator[Region]:
    """A map cut both ways by `cuts`, row by row."""
    for top, bottom in cuts(height, most, align):
        for left, right in cuts(width, most, align):
            yield Region(top, left, bottom, right)


class Picture:
    """What a network sees of a picture, read a region at a time: padded by reflection, but never as a whole.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1.
        multiples: what height and width are padded to multiples of, one after the other.

    Raises:
        UserError: the array is not such a picture.
    """

    def __init__(self, image: npt.NDArray[Any], *multiples: int) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in _LARGEST:
            raise UserError(
                f"The image is an array {tuple(image.shape)} of {image.dtype}; it must be (height, width, 3), RGB, of "
                f"{', '.join(map(str, _LARGEST))}."
            )
        self.image = image
        self.rows, self.columns = (_padded(length, multiples) for length in image.shape[:2])
        self.height, self.width = len(self.rows), len(self.columns)

    def read(self, region: Region, device: torch.device) -> Tensor:
        """(1, 3, h, w), float32 in 0 .. 1."""
        rows, columns = self.rows[region.top : region.bottom], self.columns[region.left : region.right]
        pixels = self.image[np.ix_(rows, columns)].astype(np.float32) / np.float32(_LARGEST[self.image.dtype])
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().to(device)


_LARGEST = {np.dtype("uint8"): 255, np.dtype("uint16"): 65535, np.dtype("float32"): 1}


def _padded(length: int, multiples: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The pixel that each one of a padded side shows."""
    index = np.arange(length)
    for multiple in multiples:
        index = np.pad(index, (0, -len(index) % multiple), mode="reflect")  # to and fro, as the network's own padding
    return index
