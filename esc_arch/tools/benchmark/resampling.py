"""How an LR image was made from its HR image.

Published benchmarks have LR images by MATLAB's `imresize` (bicubic, antialiased). With others PSNR differs by tenths of
a dB and more, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow

from esc_arch.data.image_files import Image
from esc_arch.ops.resize import matlab_resize, resize_matrix

__all__ = ["MATLAB", "recognise_resampling"]

MATLAB = "MATLAB's bicubic"

#: Root mean square errors, in grey levels. Two computations of the same image differ by a level where a value lies
#: between two; rounding between rows and columns, as MATLAB does for 8-bit images, makes up to about 0.4.
_EQUAL, _CLOSE = 0.1, 0.6


def recognise_resampling(hr: Image, lr: Image, scale: int) -> str:
    """How `lr` (H, W, 3) was made from `hr` (at least H * scale, W * scale), both uint8: `MATLAB`, or another way.

    Compared are the ways of MATLAB, Pillow, OpenCV and PyTorch on the top left H * scale x W * scale of `hr`.
    """
    height, width = lr.shape[:2]
    smallest, nearest = np.inf, ""
    for name, made in _candidates(np.ascontiguousarray(hr[: height * scale, : width * scale]), height, width):
        error = np.sqrt(np.mean((made.astype(np.float32) - lr) ** 2))
        if name == MATLAB and error <= _EQUAL:
            return MATLAB
        if error < smallest:
            smallest, nearest = error, name
    return nearest if smallest <= _CLOSE else f"none of the known ways (the nearest is {nearest})"


def _candidates(image: Image, height: int, width: int) -> Iterator[tuple[str, Image]]:
    """The image made small in all known ways; of equally near ones the first counts."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    yield MATLAB, _as_image(matlab_resize(tensor, (height, width)))
    # As MATLAB does with 8-bit images: rounded after the height is done
    rows, columns = resize_matrix(image.shape[0], height), resize_matrix(image.shape[1], width)
    yield MATLAB, _as_image((rows @ tensor).clamp(0, 255).round() @ columns.T)
    for name in ("bicubic", "bilinear", "Lanczos"):
        method = Pillow.Resampling[name.upper()]
        yield f"Pillow's {name}", np.asarray(Pillow.fromarray(image).resize((width, height), method))
    for name in ("INTER_CUBIC", "INTER_AREA", "INTER_LINEAR", "INTER_LANCZOS4", "INTER_NEAREST"):
        yield f"OpenCV's {name}", cast(Image, cv2.resize(image, (width, height), interpolation=getattr(cv2, name)))
    for mode, antialias in (("bicubic", True), ("bicubic", False), ("bilinear", True)):
        made = F.interpolate(tensor, (height, width), mode=mode, antialias=antialias)
        yield f"PyTorch's {mode} {'with' if antialias else 'without'} antialias", _as_image(made)
    # Last: without antialiasing, other ways take single pixels where the scale is odd
    single = Pillow.fromarray(image).resize((width, height), Pillow.Resampling.NEAREST)
    yield "single pixels (nearest, of the middle)", np.asarray(single)


def _as_image(tensor: torch.Tensor) -> Image:
    return cast(Image, tensor[0].permute(1, 2, 0).clamp(0, 255).round().byte().numpy())
