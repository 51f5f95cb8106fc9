"""Image files as arrays, with the metadata that go with them.

Pillow reads what it can hold. It holds no colours of 16 bits, so those are read by OpenCV (PNG, compressed TIFF) and
tifffile. What cannot be enlarged as it is meant is refused rather than changed in silence.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from esc_arch.errors import UserError, first_line

from .metadata import Metadata, image_metadata, png_chunks, tiff_metadata

__all__ = [
    "READABLE_SUFFIXES",
    "DecodedImage",
    "Pixels",
    "decoded",
    "inspect_image",
    "is_animated",
    "read_image",
    "to_srgb",
]

Pixels = npt.NDArray[Any]

#: Files that folders are searched for.
READABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
#: Formats that are read, by Pillow's names.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
#: In pixels. A file of some kilobytes can claim more than any memory holds.
LARGEST_INPUT = 2**29
#: Directories of a TIFF file that are looked at. There may be more than can be read in a minute.
MOST_DIRECTORIES = 100

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: What stands near the end of a whole file.
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
#: Of Pillow's modes, those that are kept, and those that become one of these.
KEPT, CONVERTED = ("L", "LA", "RGB", "RGBA"), ("1", "La", "P", "PA", "RGBa", "RGBX", "YCbCr")


@dataclass(frozen=True)
class DecodedImage:
    """An image as it is to be seen: turned as its camera says.

    Attributes:
        pixels: (H, W, C), uint8 or uint16; C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        metadata: what goes to the result as well.
        notes: what could not be kept, a sentence each.
    """

    pixels: Pixels
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()


def read_image(path: Path) -> DecodedImage:
    """Decode an image file.

    Palettes become RGB or RGBA, one bit grey. CMYK and Lab become sRGB, by the file's profile if it has one.

    Raises:
        UserError: it cannot be read, is damaged, larger than `LARGEST_INPUT`, animated or of several pages, or has
            channels of more than 16 bits.
    """
    with _reading(path) as (file, is_tiff):
        return _read_tiff(path, file) if is_tiff else _read_other(path, file)


def inspect_image(path: Path) -> tuple[tuple[int, int], bool]:
    """Height and width, as stored, of an image file, and True if it goes on to its end; raises as `read_image`."""
    with _reading(path) as (file, is_tiff):
        length = os.fstat(file.fileno()).st_size
        if is_tiff:
            import tifffile

            with tifffile.TiffFile(file) as tiff:
                page: Any = tiff.pages[0]
                end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)))
                return (page.imagelength, page.imagewidth), end <= length
        with _open(file) as image:  # a WebP file is not opened in part
            size, mark = (image.height, image.width), ENDS.get(image.format or "", b"")
        file.seek(max(length - 4096, 0))  # other programs may have added to it
        return size, mark in file.read()


def is_animated(path: Path) -> bool:
    """True if an image file has several frames, or cannot be read."""
    try:
        with _reading(path) as (file, _), _open(file) as image:
            return getattr(image, "n_frames", 1) > 1
    except UserError:
        return True


@contextmanager
def _reading(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """An image file, and True if it is a TIFF one; what is raised becomes a line."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe may take for ever
            raise UserError("a pipe, a socket or a device, not a file. Take it out.")
        with path.open("rb") as file:
            start = file.read(4)
            if not start:
                raise UserError("empty. Replace it.")
            file.seek(0)
            yield file, start in TIFF_STARTS
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not a PNG, JPEG, WebP, TIFF, BMP or GIF image, whatever its name says, or damaged at its start. "
            "Replace it or take it out."
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: too large for the memory here. Cut it into parts.") from error
    except Exception as error:  # decoders raise whatever content without sense leads to
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
        raise UserError(f"{path}: damaged ({first_line(error)}). Replace it.") from error


def _read_other(path: Path, file: IO[bytes]) -> DecodedImage:
    with _open(file) as image:
        frames = getattr(image, "n_frames", 1)
        # MPO: what telephones call .jpg, with a depth map or another view behind the image
        if frames > 1 and image.format != "MPO":
            raise UserError(f"animated ({frames} frames). Save the frames as images, or make a video of them.")
        image.load()  # what it holds beside pixels may stand behind them
        metadata, notes = image_metadata(image)
        found = None
        if image.format == "PNG":
            metadata = png_chunks(file, metadata)
            file.seek(24)
            depth, colour_type = file.read(2)
            if depth == 16:
                found = DecodedImage(_deep_png(path, image, grey=colour_type in (0, 4)), metadata, notes)
        found = found or decoded(image, metadata, notes)
        return replace(found, pixels=_upright(found.pixels, metadata))


@contextmanager
def _open(file: IO[bytes]) -> Iterator[Image.Image]:
    """The image in a file, to be loaded within the block."""
    # Pillow's own limit is below what is enlarged here, and can only be set for all
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(file, formats=READABLE_FORMATS) as image:
            _check_size(image.height, image.width)
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(height: int, width: int) -> None:
    if height * width > LARGEST_INPUT:
        raise UserError(
            f"claims {width:,} x {height:,} pixels; up to {LARGEST_INPUT:,} are read. Cut it into parts, or remove it."
        )


def decoded(image: Image.Image, metadata: Metadata, notes: tuple[str, ...] = ()) -> DecodedImage:
    """A Pillow image with what was found beside it; the profile goes where pixels are converted by it.

    Raises:
        UserError: its numbers are of more than 16 bits, or no colours.
    """
    if image.mode.startswith("I;16"):
        return DecodedImage(np.asarray(image).astype(np.uint16)[..., None], metadata, notes)
    if image.mode in ("CMYK", "LAB"):
        name = "CMYK" if image.mode == "CMYK" else "Lab"
        image, exact = to_srgb(image, metadata.icc)
        how = "" if exact else " by a plain formula, for lack of a profile that can be used: colours are not exact"
        metadata, notes = replace(metadata, icc=None), (*notes, f"{name} was converted to sRGB{how}")
    elif image.mode in CONVERTED or (image.mode in ("L", "RGB") and "transparency" in image.info):
        grey, alpha = image.mode in ("1", "L", "La"), "A" if image.has_transparency_data else ""
        image = image.convert(f"L{alpha}" if grey else f"RGB{alpha}")
    if image.mode not in KEPT:
        raise UserError(
            f"its pixels are of a kind that is not enlarged (Pillow's mode {image.mode}). Save it with 8 or 16 bits a "
            "channel, as grey or RGB."
        )
    pixels = np.asarray(image)
    return DecodedImage(pixels.reshape(*pixels.shape[:2], -1), metadata, notes)


def to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bool]:
    """An image of 8 bits as sRGB, and True if by its profile; a plain formula is used otherwise."""
    try:
        source = (
            ImageCms.ImageCmsProfile(io.BytesIO(icc or b"")) if image.mode != "LAB" else ImageCms.createProfile("LAB")
        )
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            # Tables made in advance are off by up to ten steps of 8 bits in the shadows of greys
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE,
        )
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB"), False
    assert converted is not None  # None is returned for conversion in place alone
    return converted, True


def _deep_png(path: Path, image: Image.Image, *, grey: bool) -> Pixels:
    # OpenCV fills what is missing of a file in silence; Pillow, which has loaded it, notices
    pixels = _by_opencv(path, grey=grey)
    key = image.info.get("transparency")
    if key is not None and pixels.shape[2] in (1, 3):
        visible = (pixels != np.array(key, np.uint16)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, np.where(visible, np.uint16(65535), np.uint16(0))], axis=2)
    return pixels


def _by_opencv(path: Path, *, grey: bool) -> Pixels:
    """Pixels of 16 bits: (H, W, C), uint16."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below says it
    try:
        found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if found is None or found.dtype != np.uint16:
        raise UserError("its 16-bit pixels cannot be decoded. Save it again, as PNG or uncompressed TIFF.")
    pixels = cast(Pixels, found).reshape(*found.shape[:2], -1)
    if grey:
        return pixels[..., :1] if pixels.shape[2] < 4 else pixels[..., [0, 3]]
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.shape[2] > 1 else pixels


def _read_tiff(path: Path, file: IO[bytes]) -> DecodedImage:
    import tifffile

    # What it logs of damage is told by the error that follows, or has no effect
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        _check_size(page.imagelength, page.imagewidth)
        others = sum(not cast(Any, other).is_reduced for other in islice(tiff.pages, 1, MOST_DIRECTORIES))
        if others:
            more = " or more" * (others + 1 == MOST_DIRECTORIES)
            raise UserError(f"{others + 1} pages{more}. Save each as an image of its own.")
        bits = max(np.atleast_1d(page.bitspersample))
        if page.sampleformat != 1 or bits > 16:
            kind = {1: "whole", 2: "signed", 3: "floating-point"}.get(page.sampleformat, "other")
            raise UserError(f"its channels are {kind} numbers of {bits} bits. Save it with 8 or 16 bits a channel.")
        metadata, notes = tiff_metadata(file, page)
        if bits == 16 and page.photometric in (0, 1, 2):
            return DecodedImage(_upright(_deep_tiff(path, page), metadata), metadata, notes)
    file.seek(0)
    with _open(file) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tags, which are not taken from Pillow
        image.load()  # which turns the pixels as EXIF says, of TIFF files alone
        return decoded(image, metadata, notes)


def _deep_tiff(path: Path, page: Any) -> Pixels:
    grey = page.photometric != 2
    colours = 1 if grey else 3
    try:
        pixels = page.asarray()
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    except (ValueError, KeyError, ImportError) as error:
        # tifffile alone decodes few kinds of compression, OpenCV all but cannot tell kinds of alpha
        if "imagecodecs" not in str(error) or (grey and page.samplesperpixel > 1):
            raise
        pixels = _by_opencv(path, grey=grey)
    pixels = pixels.astype(np.uint16, copy=False)
    if pixels.shape[2] < colours:
        raise UserError(f"its pixels have {pixels.shape[2]} channels and should have {colours} or more. Save it again.")
    kinds = [int(kind) for kind in page.extrasamples]
    colour = pixels[..., :colours]
    if page.photometric == 0:
        colour = 65535 - colour
    index = next((index for index, kind in enumerate(kinds) if kind in (1, 2)), None)
    if index is None or pixels.shape[2] <= colours + index:
        return colour
    alpha = pixels[..., colours + index, None]
    if kinds[index] == 1:  # colours are stored multiplied by it
        colour = np.minimum((colour * 65535.0 / np.maximum(alpha, 1)).round(), 65535).astype(np.uint16)
    return np.concatenate([colour, alpha], axis=2)


def _upright(pixels: Pixels, metadata: Metadata) -> Pixels:
    """Turned as the camera says."""
    orientation = metadata.exif.orientation if metadata.exif else 1
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
