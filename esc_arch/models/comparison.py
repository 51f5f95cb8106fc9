"""Pictures of validated images, with captions: bicubic, result and ground truth, or LR, SR and GT for TensorBoard."""

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

from esc_arch.ops.resize import matlab_resize

__all__ = ["bicubic", "comparison_summary", "side_by_side", "validation_picture", "write_comparison"]

#: Panels of comparisons, in files and in TensorBoard, are at most this high and wide (pixels); of larger images the
#: middle is shown. Below it is a detail, magnified.
PANEL, TB_PANEL, ZOOM = 512, 256, 4
CAPTION, GAP = 26, 4

Image = np.ndarray[Any, Any]


def write_comparison(file: Path, network: str, visuals: Mapping[str, Tensor]) -> tuple[float, float]:
    """Write a picture of bicubic, result and ground truth; returns the PSNR of bicubic and of the result, in dB.

    PSNR is on Y, with a border of as many pixels cropped as the scale is, as in the paper. `visuals` are `lq`
    (1, 3, H, W), `result` and `gt` (1, 3, H * s, W * s), RGB in 0 .. 1.
    """
    result, gt = tensor2img([visuals["result"]]), tensor2img([visuals["gt"]])
    scale, enlarged = visuals["result"].shape[-1] / visuals["lq"].shape[-1], bicubic(visuals)
    psnr_bicubic, psnr = (
        calculate_psnr(image, gt, crop_border=math.ceil(scale), test_y_channel=True) for image in (enlarged, result)
    )
    panels = {
        f"bicubic x{scale:.3g}: {psnr_bicubic:.2f} dB": enlarged,
        f"{network} x{scale:.3g}: {psnr:.2f} dB": result,
        "ground truth": gt,
    }
    imwrite(side_by_side(panels), str(file))
    return psnr_bicubic, psnr


def bicubic(visuals: Mapping[str, Tensor]) -> Image:
    """`lq` enlarged to the size of `result`, as `write_comparison` has them: (H, W, 3) uint8, BGR."""
    height, width = visuals["result"].shape[-2:]
    picture: Image = tensor2img([matlab_resize(visuals["lq"], (height, width))])
    return picture


def comparison_summary(dataset: str, network: str, folder: Path, rows: Sequence[tuple[str, float, float]]) -> str:
    """A line for each image (name, PSNR of bicubic and of the result, in dB), and one for the means."""
    if not rows:
        return f"Comparison on {dataset}: no image has a ground truth."
    names, *columns = zip(*rows, strict=True)
    width, means = max(map(len, names)), [float(np.mean(column)) for column in columns]
    return f"PSNR (Y) on {dataset}, pictures in {folder}:" + "".join(
        f"\n  {name:<{width}}  bicubic {bicubic:6.2f} dB  {network} {psnr:6.2f} dB  {psnr - bicubic:+.2f} dB"
        for name, bicubic, psnr in [*rows, ("mean", means[0], means[1])]
    )


def side_by_side(panels: Mapping[str, Image], size: int = PANEL, worst: int = 0) -> Image:
    """One picture from captioned images of the same size, the last being the ground truth: (H, W, 3) uint8 each.

    The images above, below them an enlarged detail of each, taken where that of index `worst` differs most from the
    last.
    """
    images = list(panels.values())
    top, left = (max(0, (side - size) // 2) for side in images[0].shape[:2])
    images = [image[top : top + size, left : left + size] for image in images]
    height, width = images[0].shape[:2]
    detail = _worst_crop(images[worst], images[-1], max(1, height // ZOOM), max(1, width // ZOOM))
    enlarged = [cv2.resize(image[detail], (width, height), interpolation=cv2.INTER_NEAREST) for image in images]
    captioned = [_with_space_above(image, CAPTION, caption) for caption, image in zip(panels, images, strict=True)]
    below = [_with_space_above(image, GAP) for image in enlarged]
    return np.concatenate([_in_a_row(captioned), _in_a_row(below)])


def validation_picture(visuals: Mapping[str, Tensor], name: str) -> Image:
    """LR, SR and GT side by side for TensorBoard: (H, W, 3) uint8, RGB. `name` is the image's, for the caption.

    `visuals` are `lq` (1, C, h, w), `result` and maybe `gt` (1, C, H, W): grey or RGB in 0 .. 1.
    """
    images = [tensor2img([visuals[key]], rgb2bgr=False) for key in ("lq", "result", "gt") if key in visuals]
    height, width = images[1].shape[:2]
    images[0] = cv2.resize(images[0], (width, height), interpolation=cv2.INTER_NEAREST)  # so that its pixels are seen
    images = [cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image for image in images]
    return side_by_side(dict(zip((f"LR {name}", "SR", "GT"), images, strict=False)), TB_PANEL)


def _with_space_above(image: Image, height: int, caption: str = "") -> Image:
    """(H, W, 3) uint8 with a white strip above it, and a line of text there: (height + H, W, 3)."""
    white = (255, 255, 255)
    higher = cv2.copyMakeBorder(image, height, 0, 0, 0, cv2.BORDER_CONSTANT, value=white)
    return cv2.putText(higher, caption, (6, height - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)


def _in_a_row(images: Sequence[Image]) -> Image:
    """Images of one height, (H, W, 3) uint8 each, from left to right with a white gap between them."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _worst_crop(image: Image, gt: Image, height: int, width: int) -> tuple[slice, slice]:
    """The height x width part in which `image` differs most from `gt`, both (H, W, 3)."""
    error = np.abs(image.astype(np.float32) - gt.astype(np.float32)).sum(axis=2)
    sums = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    boxes = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(place) for place in np.unravel_index(boxes.argmax(), boxes.shape))
    return np.s_[top : top + height, left : left + width]
