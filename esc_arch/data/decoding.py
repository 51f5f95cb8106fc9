"""Decoding images, and what is wrong with those that cannot be: no file may fill the memory."""

from __future__ import annotations

import io
import os
import struct
import warnings
from contextlib import suppress
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import UserError

__all__ = ["decode", "image_problem", "most_pixels"]

#: OpenCV's own variable for the limit; its own default, 2**30, would need 12 GiB as a float32 image.
LIMIT_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
MOST_PIXELS = 2**28

_PNG = b"\x89PNG\r\n\x1a\n"
#: Of the formats that OpenCV reads, those whose header Pillow reads without decoding.
_FORMATS = ("JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "SUN")


def most_pixels() -> int:
    """How many pixels an image may have: `MOST_PIXELS`, or what OpenCV's environment variable says."""
    given = os.environ.get(LIMIT_VARIABLE, "")
    return int(given) if given.isdigit() else MOST_PIXELS


def decode(content: bytes, source: object, flag: int = cv2.IMREAD_COLOR) -> npt.NDArray[Any]:
    """The image in a file's `content`; by default (H, W, 3) of uint8, BGR: grey as three equal channels, without alpha.

    UserError if it is no image, cut short or too large; the message calls it `source`.
    """
    image = _image_or_problem(content, flag)
    if isinstance(image, str):
        raise UserError(f"{source} {image}. Replace it or take it out of the data set.")
    return image


def image_problem(content: bytes, listed: tuple[int, int] | None = None) -> str | None:
    """What is wrong with an image file's `content`, which is decoded: the end of a sentence about it, or None.

    `listed` are the height and width that it has in an LMDB's meta_info.txt.
    """
    image = _image_or_problem(content, cv2.IMREAD_UNCHANGED)
    if isinstance(image, str):
        return image
    height, width = image.shape[:2]
    if listed is not None and listed != (height, width):
        return f"has {width}x{height} pixels, but {listed[1]}x{listed[0]} in meta_info.txt"
    return None


def _image_or_problem(content: bytes, flag: int) -> npt.NDArray[Any] | str:
    """The decoded image, or why there is none: the end of a sentence about it."""
    height, width = size_in_header(content) or (0, 0)
    if height * width > most_pixels():  # OpenCV would fill the memory first
        return (
            f"has {width:,} x {height:,} pixels by its header, more than the {most_pixels():,} that are read: it is "
            f"damaged, or made to fill the memory. Cut it into parts, or set {LIMIT_VARIABLE} in the environment"
        )
    # OpenCV fills the rest of a JPEG without its end with grey. An embedded thumbnail has an end of its own.
    if content.startswith(b"\xff\xd8") and content.find(b"\xff\xd9", len(content) // 2) < 0:
        return f"is cut short ({len(content):,} bytes): its end is missing"
    image = None
    if content:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it says is in the answer
        with suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
        cv2.utils.logging.setLogLevel(level)
    return f"is not an image that OpenCV can read ({len(content):,} bytes)" if image is None else image


def size_in_header(content: bytes) -> tuple[int, int] | None:
    """Height and width that the header of an image file claims; None if unknown."""
    if content.startswith(_PNG):  # of which Pillow would read more than the header, and refuse what OpenCV takes
        width, height = struct.unpack(">II", content[16:24]) if len(content) >= 24 else (0, 0)
        return height, width
    Image.init()
    for factory, accept in (Image.OPEN[name] for name in _FORMATS if name in Image.OPEN):
        # Plugins answer by a truth value, or by a text that says why they cannot
        accepted = accept is None or accept(content[:16])
        if not accepted or isinstance(accepted, str):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damage, which OpenCV is to judge
                # Not Image.open, which has a limit of its own, and does not tell the size beyond it
                width, height = factory(io.BytesIO(content), "").size
        except Exception:  # of a damaged header, about anything; OpenCV is asked then
            return None
        return height, width
    return None
