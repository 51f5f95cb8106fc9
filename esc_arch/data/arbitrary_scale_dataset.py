"""HR images for networks of any scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from basicsr.data.transforms import augment
from basicsr.utils import img2tensor
from torch.utils.data import Dataset

from esc_arch.errors import UserError
from esc_arch.ops.resize import matlab_resize, round_to_8bit, scale_pair, scaled_size
from esc_arch.problems import Problem

from .hr_images import HRImages, random_start

__all__ = ["ArbitraryScaleDataset", "ScaleRange"]


@dataclass(frozen=True)
class ScaleRange:
    """The scales of a training, from the training set's options of these names.

    Attributes:
        lq_size: side of the LQ patches (pixels), the same at every scale, so that batches of all scales cost the same.
        scale_min, scale_max: scales are drawn uniformly between them; at least 1.
        sample_q: how many pixels of an HR patch are queried; by default as many as an LQ patch has.
    """

    lq_size: int = 64
    scale_min: float = 1
    scale_max: float = 4
    sample_q: int | None = None

    @classmethod
    def of(cls, opt: Mapping[str, Any]) -> ScaleRange:
        """Those of a training set's options."""
        return cls(**{name: opt[name] for name in cls.__dataclass_fields__ if opt.get(name) is not None})

    def problems(self) -> Iterator[Problem]:
        """Everything that is wrong with them."""
        if not _is_number(self.lq_size, int):
            yield Problem("lq_size", f"{self.lq_size!r} given; must be a positive integer: the side of the LQ patches")
        for name in ("scale_min", "scale_max"):
            if not _is_number(getattr(self, name), int | float):
                yield Problem(name, f"{getattr(self, name)!r} given; must be a number of at least 1")
                return
        if self.scale_min > self.scale_max:
            yield Problem("scale_min", f"{self.scale_min} is larger than scale_max {self.scale_max}. Swap them")
        if self.sample_q is not None and _is_number(self.lq_size, int):
            fewest = round(self.lq_size * self.scale_min) ** 2
            if not _is_number(self.sample_q, int) or self.sample_q > fewest:
                message = f"{self.sample_q!r} given; must be an integer from 1 to {fewest}: pixels at scale_min"
                yield Problem("sample_q", message)

    @property
    def hr_size(self) -> int:
        """Side of the HR patches (pixels) from which those of every scale can be cut."""
        return round(self.lq_size * self.scale_max)

    @property
    def points(self) -> int:
        """How many pixels of every patch are queried."""
        return self.lq_size**2 if self.sample_q is None else self.sample_q


class ArbitraryScaleDataset(Dataset[dict[str, Any]]):
    """HR images for training at scales drawn per batch, and for testing at any real scale.

    For training the items are HR patches large enough for the largest scale, of which `ESCLTEModel` makes LQ patches.
    Otherwise LQ is made from the whole image, by MATLAB's bicubic with antialiasing, rounded to 8 bit. It has
    floor(H / scale) rows; GT is cropped to this times the scale, rounded.

    Args:
        opt: the data set's options:

            - ``dataroot_gt``, ``io_backend``, ``meta_info_file``: see `HRImages`.
            - ``phase``: train, or anything else for whole images; set by BasicSR.
            - ``lq_size``, ``scale_min``, ``scale_max``, ``sample_q``: see `ScaleRange`; for training only.
            - ``use_hflip``, ``use_rot``: flip and turn patches at random (true); for training only.
            - ``scale``: a number of at least 1, or two: of height and width; not for training.

    UserError if images are missing or an option is invalid; when read, if an image cannot be decoded or is too small.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt  # BasicSR looks the name up
        if problems := list(self.option_problems(opt)):
            raise UserError("; ".join(map(str, problems)) + ".")
        self.is_train: bool = opt["phase"] == "train"
        self.images = HRImages(opt)

    @staticmethod
    def option_problems(opt: Mapping[str, Any]) -> Iterator[Problem]:
        """What is wrong with a data set's options, except those of `HRImages`; paths are those in its section."""
        if opt["phase"] == "train":
            yield from ScaleRange.of(opt).problems()
            return
        scale: Any = opt.get("scale")
        with suppress(ValueError):
            if min(scale_pair(scale)) >= 1:
                return
        yield Problem("scale", f"{scale!r} given; must be a number of at least 1, or two: [height, width]")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """RGB in 0 .. 1: in training `gt` (3, hr_size, hr_size), else `lq` and `gt`; and the path of the HR image."""
        path, image = self.images.paths[index], self.images.read(index)
        if self.is_train:
            size = ScaleRange.of(self.opt).hr_size
            top, left = random_start(image, size, 1, path)
            patch = _scaled(image[top : top + size, left : left + size])
            patch = augment(patch, self.opt.get("use_hflip", True), self.opt.get("use_rot", True))
            return {"gt": img2tensor(patch, bgr2rgb=True, float32=True), "gt_path": path}
        hr = img2tensor(_scaled(image), bgr2rgb=True, float32=True)
        scales = scale_pair(self.opt["scale"])
        # A quotient like 35 / 1.4 may come out a little below the whole number it is
        lq_height, lq_width = (math.floor(n / s + 1e-9) for n, s in zip(hr.shape[-2:], scales, strict=True))
        if min(lq_height, lq_width) < 1:
            raise UserError(
                f"{path} has {hr.shape[1]} x {hr.shape[2]} pixels (height x width), too few to be reduced by the scale "
                f"{self.opt['scale']}. Remove it from the data set."
            )
        height, width = scaled_size((lq_height, lq_width), scales)
        gt = hr[:, :height, :width]
        lq = round_to_8bit(matlab_resize(gt[None], (lq_height, lq_width)))[0]
        return {"lq": lq, "gt": gt, "lq_path": path, "gt_path": path}


def _scaled(image: Any) -> Any:
    """0 .. 255 -> 0 .. 1."""
    return image.astype(np.float32) / np.float32(255)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 1 <= value < math.inf
