"""Pictures and figures that set a network's result beside plain bicubic enlargement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.metrics import calculate_psnr
from basicsr.utils import imwrite, tensor2img
from basicsr.utils.matlab_functions import imresize
from torch import Tensor

__all__ = ["Comparison", "side_by_side"]

#: Panels are at most this high and wide (pixels); larger images are cropped around their centre.
PANEL = 512
CAPTION = 26


class Comparison:
    """Collects the images of one validation run: writes a picture of each and averages their PSNR.

    PSNR is on Y, with a border of `scale` pixels cropped, as in the paper.

    Args:
        folder: pictures go to folder/comparison/<data set>/<image>.png; those of earlier validations are replaced.
        dataset: its name.
        network: what the result's caption says.
    """

    def __init__(self, folder: str, dataset: str, network: str) -> None:
        self.folder = Path(folder, "comparison", dataset)
        self.dataset = dataset
        self.network = network
        self.rows: list[tuple[str, float, float]] = []

    def add(self, lq_path: str, visuals: Mapping[str, Tensor]) -> None:
        """Take one image: `lq` (1, 3, H, W), `result` and `gt` (1, 3, H * s, W * s), RGB in 0 .. 1.

        Images without ground truth are left out.
        """
        if "gt" not in visuals:
            return
        result, gt = tensor2img([visuals["result"]]), tensor2img([visuals["gt"]])
        scale = visuals["result"].shape[-1] // visuals["lq"].shape[-1]
        bicubic = tensor2img([imresize(visuals["lq"][0], scale)])
        psnr_bicubic, psnr = (
            calculate_psnr(image, gt, crop_border=scale, test_y_channel=True) for image in (bicubic, result)
        )
        name = Path(lq_path).stem
        self.rows.append((name, psnr_bicubic, psnr))
        panels = {
            f"bicubic x{scale}: {psnr_bicubic:.2f} dB": bicubic,
            f"{self.network} x{scale}: {psnr:.2f} dB": result,
            "ground truth": gt,
        }
        imwrite(side_by_side(panels), str(self.folder / f"{name}.png"))

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


def side_by_side(panels: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """One picture from captioned images of the same size: (H, W, 3) uint8 BGR each."""
    columns = []
    for caption, image in panels.items():
        top, left = (max(0, (size - PANEL) // 2) for size in image.shape[:2])
        image = image[top : top + PANEL, left : left + PANEL]
        strip = np.full((CAPTION, image.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, caption, (6, CAPTION - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        columns.append(np.concatenate([strip, image]))
        columns.append(np.full((columns[-1].shape[0], 4, 3), 255, np.uint8))
    return np.concatenate(columns[:-1], axis=1)
