"""What TensorBoard shows of a validated image."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from basicsr.utils import tensor2img
from torch import Tensor

from .comparison import Image, captioned, in_a_row, worst_place

__all__ = ["CROP", "validation_picture"]

#: Sides of what is shown are at most this long, in pixels of the output.
CROP = 128
#: How many times it is enlarged.
ZOOM = 2


def validation_picture(visuals: Mapping[str, Tensor], name: str) -> Image:
    """The part of an image in which the result differs most from the ground truth: LR, SR and GT in a row.

    The low-resolution image is enlarged to the size of the output by nearest neighbour, so that its pixels are seen.
    Without ground truth, LR and SR are shown where they differ most.

    Args:
        visuals: `lq` (1, C, h, w), `result` and, if there is one, `gt` (1, C, H, W), with C 1 (grey) or 3 (RGB), in
            0 .. 1.
        name: of the image, for the caption.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    sr = _image(visuals["result"])
    height, width = sr.shape[:2]
    lr = cv2.resize(_image(visuals["lq"]), (width, height), interpolation=cv2.INTER_NEAREST)
    panels = {f"LR {name}": lr, "SR": sr}
    if "gt" in visuals:
        panels["GT"] = _image(visuals["gt"])
    reference = panels.get("GT", lr)
    crop = min(height, CROP), min(width, CROP)
    top, left = worst_place(sr, reference, *crop)
    return in_a_row(
        [
            captioned(caption, _enlarged(panel[top : top + crop[0], left : left + crop[1]]))
            for caption, panel in panels.items()
        ]
    )


def _image(tensor: Tensor) -> Image:
    image: Image = tensor2img([tensor], rgb2bgr=False)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _enlarged(image: Image) -> Image:
    return image.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
