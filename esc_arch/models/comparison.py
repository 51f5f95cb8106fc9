"""Pictures and figures that set a network's result beside plain bicubic enlargement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.metrics import calculate_psnr
from basicsr.utils import imwrite, tensor2img
from torch import Tensor

from esc_arch.data.names import image_name
from esc_arch.ops.resize import matlab_resize

__all__ = ["Comparison", "captioned", "in_a_row", "side_by_side", "worst_place"]

Row = tuple[str, float, float]

#: Panels are at most this high and wide (pixels); of larger images the middle is shown.
PANEL = 512
CAPTION = 26
GAP = 4
#: How many times the detail below an image is enlarged.
ZOOM = 4

Image = np.ndarray[Any, Any]


class Comparison:
    """Collects the images of one validation run: writes a picture of each and averages their PSNR.

    PSNR is on Y, with a border of as many pixels cropped as the scale is, as in the paper.

    Args:
        folder: pictures go to folder/comparison/<data set>/<image>.png; those of earlier validations are replaced.
        dataset: its name.
        network: what the result's caption says.
    """

    def __init__(self, folder: str, dataset: str, network: str) -> None:
        self.folder = Path(folder, "comparison", dataset)
        self.dataset = dataset
        self.network = network
        self.rows: list[Row] = []

    def add(self, lq_path: str, visuals: Mapping[str, Tensor]) -> Row | None:
        """Take one image: `lq` (1, 3, H, W), `result` and `gt` (1, 3, H * s, W * s), RGB in 0 .. 1.

        Returns its name and the PSNR of bicubic and of the result, in dB, which also becomes one of `rows`; None for
        an image without ground truth, which is left out.
        """
        if "gt" not in visuals:
            return None
        result, gt = tensor2img([visuals["result"]]), tensor2img([visuals["gt"]])
        height, width = visuals["result"].shape[-2:]
        scale = width / visuals["lq"].shape[-1]
        bicubic = tensor2img([matlab_resize(visuals["lq"], (height, width))])
        psnr_bicubic, psnr = (
            calculate_psnr(image, gt, crop_border=math.ceil(scale), test_y_channel=True) for image in (bicubic, result)
        )
        name = image_name(lq_path)
        row = (name, psnr_bicubic, psnr)
        self.rows.append(row)
        panels = {
            f"bicubic x{scale:.3g}: {psnr_bicubic:.2f} dB": bicubic,
            f"{self.network} x{scale:.3g}: {psnr:.2f} dB": result,
            "ground truth": gt,
        }
        imwrite(side_by_side(panels), str(self.folder / f"{name}.png"))
        return row

    def summary(self) -> str:
        """The figures of all images and their means, a line each."""
        if not self.rows:
            return f"Comparison on {self.dataset}: no image has a ground truth."
        width = max(len(name) for name, *_ in self.rows)
        means = tuple(float(np.mean(column)) for column in list(zip(*self.rows, strict=True))[1:])
        lines = [
            f"  {name:<{width}}  bicubic {bicubic:6.2f} dB  {self.network} {psnr:6.2f} dB  {psnr - bicubic:+.2f} dB"
            for name, bicubic, psnr in [*self.rows, ("mean", means[0], means[1])]
        ]
        return "\n".join([f"PSNR (Y) on {self.dataset}, pictures in {self.folder}:", *lines])


def side_by_side(panels: Mapping[str, Image]) -> Image:
    """One picture from captioned images of the same size, the last being the ground truth: (H, W, 3) uint8 BGR each.

    The images above, below them an enlarged detail of each, taken where the first differs most from the last.
    """
    images = list(panels.values())
    starts = [max(0, (size - PANEL) // 2) for size in images[0].shape[:2]]
    images = [image[starts[0] : starts[0] + PANEL, starts[1] : starts[1] + PANEL] for image in images]
    height, width = images[0].shape[:2]
    detail_height, detail_width = max(1, height // ZOOM), max(1, width // ZOOM)
    top, left = worst_place(images[0], images[-1], detail_height, detail_width)
    parts = []
    for caption, image in zip(panels, images, strict=True):
        detail = image[top : top + detail_height, left : left + detail_width]
        detail = cv2.resize(detail, (width, height), interpolation=cv2.INTER_NEAREST)
        gap = np.full((GAP, width, 3), 255, np.uint8)
        parts.append(np.concatenate([captioned(caption, image), gap, detail]))
    return in_a_row(parts)


def captioned(caption: str, image: Image) -> Image:
    """(H, W, 3) uint8 with a line of text above it: (H + CAPTION, W, 3)."""
    strip = np.full((CAPTION, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, caption, (6, CAPTION - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, image])


def in_a_row(images: Sequence[Image]) -> Image:
    """Images of one height, (H, W, 3) uint8 each, from left to right with a white gap between them."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def worst_place(image: Image, gt: Image, height: int, width: int) -> tuple[int, int]:
    """Top and left of the height x width part in which `image` differs most from `gt`, both (H, W, 3)."""
    error = np.abs(image.astype(np.float32) - gt.astype(np.float32)).sum(axis=2)
    sums = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    boxes = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    return int(top), int(left)
