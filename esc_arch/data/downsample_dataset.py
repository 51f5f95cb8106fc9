"""Pairs whose LR images are made from HR images while training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from basicsr.data.transforms import augment
from basicsr.utils import img2tensor
from torch.utils.data import Dataset

from esc_arch.ops.resize import matlab_resize, round_to_8bit

from .hr_images import HRImages, random_start
from .image_files import Image, crop_to_multiple

__all__ = ["DownsampleImageDataset"]

FloatImage = npt.NDArray[np.float32]

#: How far the bicubic kernel reaches from a pixel of the LR image, in LR pixels.
_REACH = 2


class DownsampleImageDataset(Dataset[dict[str, Any]]):
    """HR images, and their LR images by MATLAB's bicubic with antialiasing; takes the place of PairedImageDataset.

    Patches are drawn as in PairedImageDataset and reduced with what the kernel reaches around them: LQ is within 1e-6
    of the same place in the whole image's LR image. Of sub-images, the kernel sees nothing beyond their borders.

    Args:
        opt: the data set's options:

            - ``dataroot_gt``, ``io_backend``, ``meta_info_file``: see `HRImages`.
            - ``scale``: integer, set by BasicSR to the option file's. Images are cropped to a multiple of it.
            - ``phase``: train for random patches, anything else for whole images; set by BasicSR.
            - ``gt_size``: side of HR patches, a multiple of scale; for training only.
            - ``use_hflip``, ``use_rot``: flip and turn patches at random (true).
            - ``round_lq``: round LQ to 8 bit, as files are (true).

    UserError if images are missing; when read, if one cannot be decoded or is smaller than ``gt_size``.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt  # BasicSR looks the name up
        self.images = HRImages(opt)
        self.scale: int = opt["scale"]
        self.is_train: bool = opt["phase"] == "train"
        self.round_lq: bool = opt.get("round_lq", True)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`gt` (3, H, W) and `lq` (3, H / scale, W / scale), RGB in 0 .. 1; `gt_path` and `lq_path`, the HR image's."""
        path = self.images.paths[index]
        image = crop_to_multiple(self.images.read(index), self.scale)
        if self.is_train:
            size: int = self.opt["gt_size"]
            pair = self.cut(image, *random_start(image, size, self.scale, path), size, size)
            gt, lq = augment(list(pair), self.opt.get("use_hflip", True), self.opt.get("use_rot", True))
        else:
            gt, lq = self.cut(image, 0, 0, *image.shape[:2])
        gt, lq = img2tensor([gt, lq], bgr2rgb=True, float32=True)
        return {"gt": gt, "lq": lq, "gt_path": path, "lq_path": path}

    def cut(self, image: Image, top: int, left: int, height: int, width: int) -> tuple[FloatImage, FloatImage]:
        """The patch of an image (H, W, 3) at a place, and its LR patch; all numbers are multiples of scale.

        Returns:
            (height, width, 3) and (height / scale, width / scale, 3), in 0 .. 1.
        """
        margin = _REACH * self.scale
        first = max(0, top - margin), max(0, left - margin)
        around = image[first[0] : top + height + margin, first[1] : left + width + margin].astype(np.float32)
        around /= 255
        y, x = top - first[0], left - first[1]
        gt = around[y : y + height, x : x + width]
        reduced_size = (around.shape[0] // self.scale, around.shape[1] // self.scale)
        reduced = matlab_resize(torch.from_numpy(around).permute(2, 0, 1)[None], reduced_size)
        lq = (round_to_8bit(reduced) if self.round_lq else reduced)[0].permute(1, 2, 0).numpy()
        y, x, height, width = (number // self.scale for number in (y, x, height, width))
        return np.ascontiguousarray(gt), np.ascontiguousarray(lq[y : y + height, x : x + width])
