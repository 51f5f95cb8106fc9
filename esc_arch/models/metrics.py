"""Metrics of validated images; where one is not defined, a message instead of a traceback."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
from basicsr.utils.registry import METRIC_REGISTRY

from esc_arch.errors import UserError

__all__ = ["image_measured", "measure", "needs_ground_truth", "too_small"]

#: How messages name the image that is being validated.
image_measured: ContextVar[str] = ContextVar("image_measured", default="an image")

_SSIM_WINDOW = 11
_NIQE_BLOCK = 96


def needs_ground_truth(metric: Mapping[str, Any]) -> bool:
    """True if an entry of `val: metrics:` compares the result with the ground truth: its function takes `img2`."""
    kind = metric.get("type")
    if kind not in METRIC_REGISTRY:
        return False
    img2 = inspect.signature(METRIC_REGISTRY.get(kind)).parameters.get("img2")
    return img2 is not None and img2.default is img2.empty


def too_small(metric: Mapping[str, Any], height: int, width: int) -> str | None:
    """Why a metric is not defined for images of this size; None if it is, or is not known."""
    border = metric.get("crop_border", 0)
    if not isinstance(border, int):
        return None
    height, width = height - 2 * border, width - 2 * border
    if min(height, width) < 1:
        return f"crop_border {border} leaves nothing"
    kind, behind = str(metric.get("type")), f" behind crop_border {border}" if border else ""
    if kind == "calculate_ssim" and min(height, width) < _SSIM_WINDOW:
        return f"SSIM needs {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels{behind}"
    if kind == "calculate_niqe" and (height // _NIQE_BLOCK) * (width // _NIQE_BLOCK) < 2:
        return f"NIQE needs two blocks of {_NIQE_BLOCK} x {_NIQE_BLOCK} pixels{behind}"
    return None


def measure(calculate: Callable[[Any, Any], Any], images: Mapping[str, Any], metric: Mapping[str, Any]) -> Any:
    """A metric of an image: `calculate(images, metric)`; NaN and a warning where the metric is not defined for it.

    `images` are the result, `img`, and the ground truth, if there is one, `img2`: (H, W, C) or (H, W), uint8. UserError
    if the metric needs ground truth, and there is none, or of another size.
    """
    kind, name, image, truth = metric.get("type"), image_measured.get(), images.get("img"), images.get("img2")
    if truth is None and needs_ground_truth(metric):
        raise UserError(
            f"val: metrics: {kind} compares with ground truth, and {name} has none. Remove the metric, or give a data "
            f"set with dataroot_gt."
        )
    if not isinstance(image, np.ndarray) or metric.get("input_order", "HWC") != "HWC":
        return calculate(images, metric)
    if isinstance(truth, np.ndarray) and image.shape != truth.shape and needs_ground_truth(metric):
        raise UserError(
            f"val: metrics: {kind} compares images of one size; the result for {name} has {_size(image)} pixels and "
            f"its ground truth {_size(truth)}. Compare scale with the data set."
        )
    reason = too_small(metric, *image.shape[:2])
    if reason is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # numpy's; the warning below says more
                return calculate(images, metric)
        except np.linalg.LinAlgError:
            reason = "the image is flat, or almost, which leaves nothing to compute it from"
    logging.getLogger("basicsr").warning("%s has no %s (%s pixels): %s.", name, kind, _size(image), reason)
    return math.nan


def _size(image: Any) -> str:
    """Width x height."""
    return f"{image.shape[1]} x {image.shape[0]}"
