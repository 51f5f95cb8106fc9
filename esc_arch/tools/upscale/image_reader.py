"""Picture files as arrays, with what has to go with them: colour profile and camera data.

Pillow reads what it can hold. It holds no colours of 16 bits, so those are read by OpenCV (PNG, compressed TIFF) and
tifffile. What cannot be enlarged as it is meant is refused rather than changed in silence.
"""

from __future__ import annotations

import io
import logging
import mmap
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from esc_arch.errors import UserError

from .exif import Exif, parse

__all__ = ["LARGEST_INPUT", "PICTURE_SUFFIXES", "Picture", "Pixels", "pixels_of", "read_picture", "to_srgb"]

Pixels = npt.NDArray[Any]

#: Files that folders are searched for.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
#: Formats that are read, by Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
#: In pixels. A file of some kilobytes can claim more than any memory holds.
LARGEST_INPUT = 2**29

PNG_START, TIFF_STARTS = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Chunks of a PNG file that say how its numbers are colours, where no profile does.
PNG_COLOUR = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
#: Of Pillow's modes, those that are kept, and what others become.
KEPT = ("L", "LA", "RGB", "RGBA")
CONVERTED = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}

_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A picture as it is to be seen: turned as its camera says.

    Attributes:
        pixels: (H, W, C), uint8 or uint16; C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        icc: its colour profile, byte for byte.
        exif: what its camera says, made to fit the turned pixels.
        png_colour: chunks of `PNG_COLOUR`, name and content.
        remarks: what could not be kept, a sentence each.
    """

    pixels: Pixels
    icc: bytes | None = None
    exif: Exif | None = None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    remarks: tuple[str, ...] = ()


def read_picture(path: Path) -> Picture:
    """The picture in a file.

    Palettes become RGB or RGBA, one bit grey. CMYK and Lab become sRGB, by the file's profile if it has one.

    Raises:
        UserError: it cannot be read, is damaged, larger than `LARGEST_INPUT`, animated or of several pages, or has
            channels of more than 16 bits.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not a PNG, JPEG, WebP, TIFF or BMP picture, whatever its name says, or damaged at its start. "
            "Replace it or take it out."
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: too large for the memory here. Cut it into parts.") from error
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
        raise UserError(f"{path}: damaged ({_one_line(error)}). Replace it.") from error
    except (
        *(ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, EOFError, SyntaxError),
        *(struct.error, zlib.error, cv2.error),
    ) as error:  # what decoders raise for content that makes no sense
        raise UserError(f"{path}: damaged ({_one_line(error)}). Replace it.") from error


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")


def _read(path: Path, file: IO[bytes]) -> Picture:
    start = file.read(32)
    if not start:
        raise UserError("empty. Replace it.")
    file.seek(0)
    if start[:4] in TIFF_STARTS:
        picture = _read_tiff(path, file)
    else:
        with _open(file) as image:
            _check_frames(image)
            picture = _described(image)
            if start.startswith(PNG_START):
                picture = replace(picture, png_colour=_png_colour(path))
            if start.startswith(PNG_START) and start[24] == 16:
                picture = replace(picture, pixels=_deep_png(path, image, grey=start[25] in (0, 4)))
            else:
                picture = _with_pixels_of(picture, image)
    return _upright(picture)


@contextmanager
def _open(file: IO[bytes]) -> Iterator[Image.Image]:
    """The image in a file, to be loaded within the block."""
    with _pillow_limit:  # Pillow's own limit is below what is enlarged here, and can only be set for all
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.height, image.width)
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(height: int, width: int) -> None:
    if height * width > LARGEST_INPUT:
        raise UserError(
            f"claims {width:,} x {height:,} pixels; up to {LARGEST_INPUT:,} are read. Cut it into parts, or take it "
            "out if that cannot be."
        )


def _check_frames(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    # MPO: what telephones call .jpg, with a depth map or another view behind the picture
    if frames > 1 and image.format != "MPO":
        raise UserError(f"animated ({frames} frames). Save the frames as pictures, or make a video of them.")


def _described(image: Image.Image) -> Picture:
    """What goes with the pixels, without the pixels."""
    exif = None
    remarks: tuple[str, ...] = ()
    if image.info.get("exif"):
        try:
            exif = parse(image.info["exif"])
        except ValueError as error:
            remarks = (f"its EXIF data are damaged ({error}) and left out",)
    return Picture(np.empty((0, 0, 0)), image.info.get("icc_profile") or None, exif, (), remarks)


def _with_pixels_of(picture: Picture, image: Image.Image) -> Picture:
    pixels, icc, remarks = pixels_of(image, picture.icc)
    return replace(picture, pixels=pixels, icc=icc, remarks=(*picture.remarks, *remarks))


def pixels_of(image: Image.Image, icc: bytes | None = None) -> tuple[Pixels, bytes | None, tuple[str, ...]]:
    """The pixels of a Pillow image as `Picture` has them, the profile that they have then, and remarks.

    Raises:
        UserError: its numbers are of more than 16 bits, or no colours.
    """
    remarks: tuple[str, ...] = ()
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None], icc, ()
    if image.mode in ("CMYK", "LAB"):
        name = "CMYK" if image.mode == "CMYK" else "Lab"
        image, exact = to_srgb(image, icc)
        how = "" if exact else " by a plain formula, for lack of a profile that can be used: colours are not exact"
        icc, remarks = None, (f"{name} was converted to sRGB{how}",)
    elif image.mode == "P" or (image.mode in ("1", "L", "RGB") and "transparency" in image.info):
        grey = image.mode in ("1", "L")
        see_through = "transparency" in image.info or (image.palette is not None and image.palette.mode == "RGBA")
        image = image.convert(("LA" if grey else "RGBA") if see_through else "RGB")
    elif image.mode in CONVERTED:
        image = image.convert(CONVERTED[image.mode])
    if image.mode not in KEPT:
        raise UserError(
            f"its pixels are of a kind that is not enlarged (Pillow's mode {image.mode}). Save it with 8 or 16 bits a "
            "channel, as grey or RGB."
        )
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), icc, remarks


def to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bool]:
    """An image of 8 bits as sRGB by its profile, and whether that could be; a plain formula is used otherwise."""
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


def _png_colour(path: Path) -> tuple[tuple[bytes, bytes], ...]:
    chunks = []
    with path.open("rb") as file:
        file.seek(len(PNG_START))
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"IDAT":
                break
            if name in PNG_COLOUR and length <= 32:
                chunks.append((name, file.read(length)))
                length = 0
            file.seek(length + 4, io.SEEK_CUR)
    return tuple(chunks)


def _deep_png(path: Path, image: Image.Image, *, grey: bool) -> Pixels:
    # OpenCV fills what is missing of a file in silence; Pillow notices
    image.load()
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


def _read_tiff(path: Path, file: IO[bytes]) -> Picture:
    import tifffile

    # What it logs of damage is told by the error that follows, or has no effect
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        _check_size(page.imagelength, page.imagewidth)
        pages = sum(1 for other in tiff.pages if not cast(Any, other).is_reduced) if len(tiff.pages) > 1 else 1
        if pages > 1:
            raise UserError(f"{pages} pages. Save each as a picture of its own.")
        bits = np.atleast_1d(page.bitspersample)
        if page.sampleformat != 1 or max(bits) > 16:
            kind = {1: "whole numbers", 2: "numbers with a sign", 3: "floating-point numbers"}.get(page.sampleformat)
            raise UserError(
                f"its channels are {kind or 'numbers'} of {max(bits)} bits. Save it with 8 or 16 bits a channel."
            )
        deep = max(bits) == 16 and page.photometric in (0, 1, 2)
        pixels = _deep_tiff(path, page) if deep else None
        profile = page.tags.get(34675)
        picture = Picture(np.empty((0, 0, 0)), bytes(profile.value) if profile is not None else None)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            picture = replace(picture, exif=_without_notes(parse(cast(bytes, mapped)).descriptive()))
        except ValueError as error:
            picture = replace(picture, remarks=(f"its EXIF data are damaged ({error}) and left out",))
    if pixels is not None:
        return replace(picture, pixels=pixels)
    file.seek(0)
    with _open(file) as image:
        # The pixels of TIFF files are turned when Pillow loads them, and by what it finds here
        orientation = picture.exif.orientation if picture.exif else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags, which are not taken from Pillow
            image.load()
        if orientation != 1 and picture.exif is not None and image.getexif().get(0x0112, 1) == 1:
            picture = replace(picture, exif=picture.exif.upright(image.height, image.width))
        return _with_pixels_of(picture, image)


def _without_notes(exif: Exif) -> Exif:
    """Without what programs wrote of the shape of the array in place of a description of the scene."""
    text = exif.tags.get(0x010E)
    shape = isinstance(text, tuple) and text.data.startswith((b'{"shape"', b"ImageJ="))
    return Exif(exif.order, {tag: found for tag, found in exif.tags.items() if tag != 0x010E or not shape})


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


def _upright(picture: Picture) -> Picture:
    """Turned as the camera says, and saying so no more."""
    if picture.exif is None:
        return picture
    pixels, orientation = picture.pixels, picture.exif.orientation
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    return replace(picture, pixels=np.ascontiguousarray(pixels), exif=picture.exif.upright(height, width))
