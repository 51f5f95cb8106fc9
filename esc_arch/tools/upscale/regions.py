"""How maps are cut into tiles, and images that are read a region at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

__all__ = ["PaddedImage", "cuts", "grid"]

#: The largest value of each type that images may have.
PEAKS = {np.dtype("uint8"): 255, np.dtype("uint16"): 65535, np.dtype("float32"): 1}


def cuts(length: int, largest: int, align: int = 1) -> list[tuple[int, int]]:
    """Cut 0 .. length into nearly equal parts, at multiples of `align`.

    A remainder of less than `align` at the end belongs to the last part and is not counted: attention reflects the map
    there, and what it reflects has to be in the same part.

    Args:
        largest: the longest part, at least `align`.
    """
    units = max(length // align, 1)
    count = -(-units // max(largest // align, 1))
    edges = [units * index // count * align for index in range(count)] + [length]
    return list(pairwise(edges))


def grid(size: tuple[int, int], largest: int, align: int = 1) -> list[Region]:
    """A map of this height and width cut both ways by `cuts`, row by row."""
    rows, columns = (cuts(length, largest, align) for length in size)
    return [Region(top, left, bottom, right) for top, bottom in rows for left, right in columns]


class PaddedImage:
    """An image as a network sees it, padded by reflection, read a region at a time and never padded as a whole.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1.
        multiples: what height and width are padded to multiples of, one after the other.

    Raises:
        UserError: the array is not such an image.
    """

    def __init__(self, image: npt.NDArray[Any], *multiples: int) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in PEAKS:
            raise UserError(
                f"The image is an array {tuple(image.shape)} of {image.dtype}; it must be (height, width, 3), RGB, of "
                f"{', '.join(map(str, PEAKS))}."
            )
        self.image = image
        self.rows, self.columns = (_padded(length, multiples) for length in image.shape[:2])
        self.height, self.width = len(self.rows), len(self.columns)

    def read(self, region: Region, device: torch.device) -> Tensor:
        """(1, 3, h, w), float32 in 0 .. 1."""
        rows, columns = self.rows[region.top : region.bottom], self.columns[region.left : region.right]
        pixels = self.image[np.ix_(rows, columns)].astype(np.float32) / np.float32(PEAKS[self.image.dtype])
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().to(device)


def _padded(length: int, multiples: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The pixel that each one of a padded side shows."""
    index = np.arange(length)
    for multiple in multiples:
        index = np.pad(index, (0, -len(index) % multiple), mode="reflect")  # to and fro, as the network's own padding
    return index
