"""Writing images: PNG and TIFF in the memory of some rows, JPEG and WebP from a whole array."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import putchunk

from esc_arch.atomic_io import replacing
from esc_arch.errors import UserError

from .image_reader import DecodedImage, Pixels, to_srgb
from .metadata import DESCRIPTIVE, EXIF, EXIF_MARKER, GPS, TEXTS, XMP_CHUNK, XMP_SEGMENT, XMP_TAG, Metadata

__all__ = ["LARGEST_SIDE", "WRITABLE_SUFFIXES", "EncodeSpec", "encode_spec", "write_image"]

#: Formats that are written, by `--ext`, and the largest side of each in pixels.
LARGEST_SIDE = {"png": 2**31 - 1, "jpg": 65535, "webp": 16383, "tiff": 2**31 - 1}
WRITABLE_SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
#: Bytes a pixel while a JPEG or WebP is encoded: the array, and Pillow's copy of it.
ENCODING = 8

#: A compromise of zlib: twice as fast as its default, with files some percent larger.
COMPRESSION = 4
#: Rows that are compressed together; those of a TIFF's strips.
STRIP = 64
#: Bytes of pixels in a TIFF file whose places have 32 bits; the rest is left for all else.
LARGEST_CLASSIC_TIFF = 2**32 - 2**26
#: What JPEG's markers hold.
LARGEST_JPEG_EXIF = 65533 - len(EXIF_MARKER)
LARGEST_JPEG_XMP = 65533 - len(XMP_SEGMENT)


@dataclass(frozen=True)
class EncodeSpec:
    """What an image file is to be: of a kind of `LARGEST_SIDE`, with pixels as in `DecodedImage`.

    `notes` say what the format cannot hold, a sentence each.
    """

    kind: str
    height: int
    width: int
    channels: int
    dtype: npt.DTypeLike
    metadata: Metadata
    quality: int = 95
    lossless: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_big(self) -> bool:
        """True if it needs BigTIFF."""
        return self.height * self.width * self.channels * np.dtype(self.dtype).itemsize > LARGEST_CLASSIC_TIFF


def encode_spec(
    path: Path,
    image: DecodedImage,
    size: tuple[int, int],
    *,
    quality: int = 95,
    lossless: bool = False,
    max_memory: int | None = None,
) -> EncodeSpec:
    """What the enlarged `image`, of `size` (H, W), becomes in the file `path`.

    Raises:
        UserError: the format cannot hold it, or not within `max_memory` bytes.
    """
    kind = WRITABLE_SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: not a format that can be written; allowed: {' '.join(WRITABLE_SUFFIXES)}.")
    (height, width), channels = size, image.pixels.shape[2]
    result, others = f"the result has {width:,} x {height:,} pixels", "--ext png or --ext tiff"
    if max(size) > LARGEST_SIDE[kind]:
        raise UserError(f"{result}; {kind} holds up to {LARGEST_SIDE[kind]:,} a side. Use {others}.")
    if kind == "jpg" and channels in (2, 4):
        raise UserError("has an alpha channel, which JPEG cannot hold. Use --ext png, webp or tiff.")
    if kind in ("jpg", "webp") and max_memory is not None and height * width * ENCODING > max_memory:
        raise UserError(
            f"{result}; encoding {kind} takes all of it at once, more memory than --max-memory. "
            f"Use {others}, which are written row by row."
        )
    deep = image.pixels.dtype == np.uint16 and kind in ("png", "tiff")
    exif, notes = image.metadata.exif, tuple[str, ...]()
    if exif is not None:
        exif = exif.fitted(height, width)
        if kind == "jpg" and len(exif.encode()) > LARGEST_JPEG_EXIF:
            exif, notes = None, ("its EXIF data are longer than JPEG holds and left out",)
    xmp, found = image.metadata.xmp, image.metadata.texts
    if xmp is not None and kind == "jpg" and len(xmp) > LARGEST_JPEG_XMP:
        xmp, notes = None, (*notes, "its XMP data are longer than JPEG holds and left out")
    texts = tuple(each for each in found if each[0] in TEXTS.get(kind, ()))
    if found and not texts:
        what = "PNG text" if found[0][0] in TEXTS["png"] else "JPEG comment or IPTC data"
        notes = (*notes, f"its {what} cannot be kept in {kind} and left out")
    metadata = replace(image.metadata, exif=exif, xmp=xmp, texts=texts)
    return EncodeSpec(
        kind, height, width, channels, np.uint16 if deep else np.uint8, metadata, quality, lossless, notes
    )


def write_image(path: Path, spec: EncodeSpec, rows: Iterable[Pixels]) -> None:
    """Write an image whose rows, (h, W, C) at a time, come from the top to the bottom.

    The file takes the place of `path` at the end, whole, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            ENCODERS[spec.kind](file, spec, rows)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written: {reason}. Nothing of it is left.") from error


def _strips(rows: Iterable[Pixels]) -> Iterator[Pixels]:
    """Rows as `STRIP` together, but for the last."""
    waiting: Pixels | None = None
    for more in rows:
        waiting = more if waiting is None else np.concatenate([waiting, more])
        while len(waiting) >= STRIP:
            yield waiting[:STRIP]
            waiting = waiting[STRIP:]
    if waiting is not None and len(waiting):
        yield waiting


def _write_png(file: IO[bytes], spec: EncodeSpec, rows: Iterable[Pixels]) -> None:
    """PNG (third edition)."""
    metadata, depth = spec.metadata, 8 * np.dtype(spec.dtype).itemsize
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[spec.channels]
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", spec.width, spec.height, depth, colour, 0, 0, 0))
    if metadata.icc is not None:
        putchunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc))
    for name, content in metadata.png_colour:
        putchunk(file, name, content)
    if metadata.dpi is not None:
        putchunk(file, b"pHYs", struct.pack(">IIB", *(round(dpi / 0.0254) for dpi in metadata.dpi), 1))
    if metadata.exif is not None:
        putchunk(file, b"eXIf", metadata.exif.encode())
    if metadata.xmp is not None:
        putchunk(file, b"iTXt", XMP_CHUNK + bytes(4) + metadata.xmp)
    for name, content in metadata.texts:
        putchunk(file, name, content)
    packer, above = zlib.compressobj(COMPRESSION), np.zeros((1, spec.width * spec.channels * depth // 8), np.uint8)
    for strip in _strips(rows):
        raw = np.ascontiguousarray(strip, strip.dtype.newbyteorder(">")).view(np.uint8).reshape(len(strip), -1)
        # Filter 2, differences from the row above: choosing by rows makes enlarged photographs 1 % smaller
        filtered = np.insert(np.diff(raw, axis=0, prepend=above), 0, 2, axis=1)
        if packed := packer.compress(filtered.tobytes()):
            putchunk(file, b"IDAT", packed)
        above = raw[-1:]
    putchunk(file, b"IDAT", packer.flush())
    putchunk(file, b"IEND", b"")


def _write_tiff(file: IO[bytes], spec: EncodeSpec, rows: Iterable[Pixels]) -> None:
    """TIFF 6.0, or BigTIFF beyond its 4 GiB: strips, differences along rows (predictor 2), deflate."""
    import tifffile

    icc, exif, xmp, big = spec.metadata.icc, spec.metadata.exif, spec.metadata.xmp, spec.is_big
    tags: list[tuple[int | str, int, int, object, bool]] = []
    if icc is not None:
        tags.append((0x8773, 7, len(icc), icc, True))
    if xmp is not None:
        tags.append((XMP_TAG, 1, len(xmp), xmp, True))
    with tifffile.TiffWriter(file, bigtiff=big, byteorder="<") as tiff:
        if exif is not None:
            for tag, (kind, value) in exif.tags.items():
                if tag in DESCRIPTIVE:
                    value = value.encode("latin-1") if isinstance(value, str) else value
                    tags.append((tag, kind, len(value) if isinstance(value, bytes | tuple) else 1, value, True))
            for tag, name in ((EXIF, "ExifTag"), (GPS, "GPSTag")):
                if tag in exif.directories:
                    tags.append((name, 4, 1, file.tell(), True))
                    file.write(exif.directories[tag].directory(file.tell(), big=big))
        tiff.write(
            _deflated(rows),
            shape=(spec.height, spec.width, spec.channels)[: 2 if spec.channels == 1 else 3],
            dtype=spec.dtype,
            photometric="rgb" if spec.channels > 2 else "minisblack",
            planarconfig="contig" if spec.channels > 1 else None,
            extrasamples=["unassalpha"] if spec.channels in (2, 4) else None,
            rowsperstrip=STRIP,
            compression="zlib",
            predictor=True,
            resolution=spec.metadata.dpi,
            software=False,
            metadata=None,
            extratags=tags,
        )


def _deflated(rows: Iterable[Pixels]) -> Iterator[bytes]:
    for strip in _strips(rows):
        differences = strip.copy()
        differences[:, 1:] -= strip[:, :-1]
        yield zlib.compress(differences.astype(strip.dtype.newbyteorder("<")).tobytes(), COMPRESSION)


def _write_whole(file: IO[bytes], spec: EncodeSpec, rows: Iterable[Pixels]) -> None:
    """JPEG and WebP, by Pillow."""
    pixels = np.concatenate(list(rows))
    image = Image.fromarray(pixels[..., 0] if spec.channels == 1 else pixels)
    icc, dpi, exif = spec.metadata.icc, spec.metadata.dpi, spec.metadata.exif
    if spec.kind == "webp" and spec.channels < 3:
        image, icc = _grey_as_rgb(image, icc)
    options = {"quality": spec.quality, "icc_profile": icc, "exif": EXIF_MARKER + exif.encode() if exif else b""}
    if spec.metadata.xmp is not None:
        options["xmp"] = spec.metadata.xmp
    if spec.kind == "webp":
        image.save(file, "WEBP", lossless=spec.lossless, exact=spec.lossless, **options)
    else:
        # Colours at half the resolution would undo a part of the enlargement
        extra = b"".join(marker + struct.pack(">H", len(text) + 2) + text for marker, text in spec.metadata.texts)
        image.save(file, "JPEG", subsampling=0, dpi=dpi or (0, 0), extra=extra, **options)


def _grey_as_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """Grey, or grey and alpha, as RGB(A), and its profile; a profile of greys goes into the pixels."""
    alpha = image.getchannel("A") if image.mode == "LA" else None
    grey = image.getchannel("L")
    if icc is not None and icc[16:20] == b"GRAY":
        (colour, _), icc = to_srgb(grey, icc), None
    else:
        colour = grey.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
    return colour, icc


ENCODERS: dict[str, Callable[[IO[bytes], EncodeSpec, Iterable[Pixels]], None]] = {
    "png": _write_png,
    "tiff": _write_tiff,
    "jpg": _write_whole,
    "webp": _write_whole,
}
