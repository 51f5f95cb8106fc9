"""How an LR image was made from its HR image.

Published benchmarks have LR images by MATLAB's `imresize` (bicubic, antialiased). With others PSNR differs by tenths of
a dB and more, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Size = tuple[int, int]  # height, width
Resize = Callable[[Image, Size], Image]

#: Root mean square errors, in grey levels. Two computations of the same image differ by a level where a value lies
#: between two; rounding between rows and columns, as MATLAB does for 8-bit images, makes up to about 0.4.
_EQUAL, _CLOSE = 0.1, 0.6


def recognise_resampling(hr: Image, lr: Image, scale: int) -> str:
    """How `lr` (H, W, 3) was made from `hr` (at least H * scale, W * scale), both uint8: `MATLAB`, or another way.

    Compared are the ways of MATLAB, Pillow, OpenCV and PyTorch on the top left H * scale x W * scale of `hr`.
    """
    size = lr.shape[0], lr.shape[1]
    part = hr[: size[0] * scale, : size[1] * scale]
    if _rms(_matlab(part, size), lr) <= _EQUAL:
        return MATLAB
    error, _, name = min((_rms(resize(part, size), lr), rank, name) for rank, (name, resize) in enumerate(_WAYS))
    return name if error <= _CLOSE else f"none of the known ways (the nearest is {name})"


def _rms(made: Image, lr: Image) -> float:
    return float(np.sqrt(np.mean((made.astype(np.float32) - lr) ** 2)))


def _tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()


def _image(tensor: torch.Tensor) -> Image:
    return cast(Image, tensor[0].permute(1, 2, 0).clamp(0, 255).round().byte().numpy())


def _matlab(image: Image, size: Size) -> Image:
    return _image(matlab_resize(_tensor(image), size))


def _matlab_rounded(image: Image, size: Size) -> Image:
    """As MATLAB does with 8-bit images: rounded after the height is done."""
    rows, columns = (resize_matrix(*sizes) for sizes in zip(image.shape[:2], size, strict=True))
    return _image((rows @ _tensor(image)).clamp(0, 255).round() @ columns.T)


def _pillow(filter_: Pillow.Resampling) -> Resize:
    return lambda image, size: np.asarray(Pillow.fromarray(image).resize(size[::-1], filter_))


def _opencv(interpolation: int) -> Resize:
    return lambda image, size: cast(
        Image, cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=interpolation)
    )


def _torch(mode: str, **options: bool) -> Resize:
    return lambda image, size: _image(F.interpolate(_tensor(image), size, mode=mode, **options))


#: Of equally near ones the first counts.
_WAYS: Sequence[tuple[str, Resize]] = [
    (MATLAB, _matlab),
    (MATLAB, _matlab_rounded),
    ("Pillow's bicubic", _pillow(Pillow.Resampling.BICUBIC)),
    ("PyTorch's bicubic with antialias", _torch("bicubic", antialias=True)),
    ("OpenCV's INTER_CUBIC (no antialiasing)", _opencv(cv2.INTER_CUBIC)),
    ("PyTorch's bicubic without antialias", _torch("bicubic")),
    ("OpenCV's INTER_AREA (means of blocks)", _opencv(cv2.INTER_AREA)),
    ("OpenCV's INTER_LINEAR (no antialiasing)", _opencv(cv2.INTER_LINEAR)),
    ("Pillow's bilinear", _pillow(Pillow.Resampling.BILINEAR)),
    ("PyTorch's bilinear with antialias", _torch("bilinear", antialias=True)),
    ("Pillow's Lanczos", _pillow(Pillow.Resampling.LANCZOS)),
    ("OpenCV's INTER_LANCZOS4 (no antialiasing)", _opencv(cv2.INTER_LANCZOS4)),
    ("single pixels (nearest)", _opencv(cv2.INTER_NEAREST)),
    ("single pixels (nearest, of the middle)", _pillow(Pillow.Resampling.NEAREST)),
]
