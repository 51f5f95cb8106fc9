"""Images as data preparation sees them: where they come from, their names, and the cuts made of them.

Everywhere here an image is an array (H, W, 3) of uint8 in BGR order, as BasicSR's data sets read it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from ..atomic_io import read_regular
from ..errors import UserError
from .decoding import decode

__all__ = ["IMAGE_SUFFIXES", "Image", "Source", "encode_png", "folder_sources", "read_image"]

Image = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
#: As BasicSR's own scripts: larger files than the default, several times faster to write.
PNG_COMPRESSION = 1


@dataclass(frozen=True)
class Source:
    """One image to prepare, not read yet; `read`, which can be pickled, returns it (H, W, 3), or raises UserError."""

    name: str
    read: Callable[[], Image]
    #: What changes when the image may have changed; values that JSON can hold.
    identity: tuple[str | int, ...]

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return Path(self.name).stem

    @property
    def key(self) -> str:
        """The name in an LMDB: the stem, with '_' for what BasicSR cannot read back in a key."""
        return re.sub(r"[^ -~]|\.", "_", self.stem)


def folder_sources(folder: Path) -> list[Source]:
    """The images directly in `folder`, sorted by name, without hidden files.

    UserError if it is no folder, has no image, or if two of its images differ only in their suffix.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Give the folder that holds the images.")
        files = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
        )
    except PermissionError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Get the permission for it.") from error
    if not files:
        raise UserError(f"{folder} holds no image ({' '.join(IMAGE_SUFFIXES)}). Folders inside it are not searched.")
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is no file, but a pipe, a device or a link to nothing. Take it out.")
    stats = ((path, path.stat()) for path in files)
    sources = [Source(path.name, partial(read_image, path), (path.name, s.st_size, s.st_mtime_ns)) for path, s in stats]
    refuse_equal(sources, lambda source: source.stem)
    return sources


def refuse_equal(sources: Iterable[Source], name_of: Callable[[Source], str]) -> None:
    """UserError if two of the images would be stored under the same name."""
    seen: dict[str, str] = {}
    for source in sources:
        name = name_of(source)
        if seen.setdefault(name, source.name) != source.name:
            message = f"{seen[name]} and {source.name} would both be stored as {name!r}. Rename or remove one of them."
            raise UserError(message)


def digest_of(value: object) -> str:
    """A hexadecimal digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_image(path: Path) -> Image:
    """The image file `path`, as `decode` returns it; UserError if it cannot be read or decoded."""
    try:
        content = read_regular(path)  # unlike cv2.imread, takes any path on any system
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    return decode(content, path)


def encode_png(image: Image) -> bytes:
    """`image` (H, W, 3) as a PNG file."""
    _, data = cv2.imencode(".png", np.ascontiguousarray(image), [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
    return data.tobytes()


def downscale(image: Image, scale: int) -> Image:
    """`image` (H, W, 3) by MATLAB's bicubic with antialiasing: (H / scale, W / scale, 3), by BasicSR's function.

    `scale` divides H and W, each of which is at least 2 * scale: imresize mirrors the borders, and fails otherwise.
    """
    from basicsr.utils.matlab_functions import imresize

    resized = imresize(image.astype(np.float32) / 255, 1 / scale)
    return cast(Image, (np.clip(resized, 0, 1) * 255).round().astype(np.uint8))


def sub_image_starts(length: int, size: int, step: int) -> list[int]:
    """Where sub-images of `size` pixels start along `length`: every `step`, and a last one ends with the image.

    A `length` below `size` makes one sub-image, of the whole length.
    """
    last = max(length - size, 0)
    return [*range(0, last, step), last]


def checked_scales(scales: Iterable[int]) -> tuple[int, ...]:
    """`scales` sorted, each once; UserError if there is none, or one below 2."""
    checked = tuple(sorted(set(scales)))
    if not checked or checked[0] < 2:
        raise UserError(f"The scales are {list(checked)}, but must be integers of at least 2.")
    return checked


def read_hr(source: Source, scales: Sequence[int], *, crop: bool = True) -> Image:
    """The HR image of `source`, cropped at the bottom and right to a multiple of all `scales` (or not at all).

    UserError if it cannot be read, or is too small to be reduced by all `scales`.
    """
    multiple = math.lcm(*scales) if crop else 1
    smallest = max(multiple, 2 * max(scales))
    image = source.read()
    if min(image.shape[:2]) < smallest:
        raise UserError(
            f"{source.name} has {image.shape[0]} x {image.shape[1]} pixels (height x width), but each side needs "
            f"{smallest} for the scales {', '.join(map(str, scales))}. Remove it."
        )
    return crop_to_multiple(image, multiple)


def crop_to_multiple(image: Image, multiple: int) -> Image:
    """`image` (H, W, 3) without what is too much at the bottom and the right."""
    height, width = (length - length % multiple for length in image.shape[:2])
    return image[:height, :width]
