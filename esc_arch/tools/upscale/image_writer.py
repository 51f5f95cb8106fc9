"""Writing pictures: PNG and TIFF row by row, in the memory of some rows, JPEG and WebP from a whole array."""

from __future__ import annotations

import queue
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from esc_arch.atomic_io import replacing
from esc_arch.errors import UserError

from .exif import LONG8, MARK, SHORT, Directory, Exif, Value, directory_bytes, value
from .image_reader import Picture, Pixels, to_srgb

__all__ = ["FORMATS", "Form", "PictureFile", "form_of", "write_picture"]

#: Formats that are written, by `--ext`, and the largest side of each in pixels.
FORMATS = {"png": 2**31 - 1, "jpg": 65535, "webp": 16383, "tiff": 2**31 - 1}
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
#: Bytes a pixel while a JPEG or WebP is encoded: the array, and Pillow's copy of it.
ENCODING = 8

#: A compromise of zlib: twice as fast as its default, with files some percent larger.
COMPRESSION = 4
#: Rows of a TIFF's strips.
STRIP = 64
#: What JPEG's markers hold.
LARGEST_JPEG_EXIF = 65533 - len(MARK)


@dataclass(frozen=True)
class Form:
    """What a picture file is to be.

    Attributes:
        kind: a key of `FORMATS`.
        height, width: in pixels.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        dtype: uint8 or uint16.
        picture: whose profile and camera data it gets.
        quality: 1 .. 100, of JPEG and WebP.
        lossless: of WebP.
    """

    kind: str
    height: int
    width: int
    channels: int
    dtype: npt.DTypeLike
    picture: Picture
    quality: int = 95
    lossless: bool = False

    @property
    def exif(self) -> Exif | None:
        """Camera data that fit the enlarged picture."""
        found = self.picture.exif
        if found is None or not found.tags or self._is_too_long(found):
            return None
        return found.upright(self.height, self.width)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the format cannot hold, a sentence each."""
        found = self.picture.exif
        too_long = found is not None and self._is_too_long(found)
        return ("its EXIF data are longer than JPEG holds and left out",) if too_long else ()

    def _is_too_long(self, exif: Exif) -> bool:
        return self.kind == "jpg" and len(exif.block()) > LARGEST_JPEG_EXIF


def form_of(
    path: Path,
    picture: Picture,
    size: tuple[int, int],
    *,
    quality: int = 95,
    lossless: bool = False,
    max_memory: int | None = None,
) -> Form:
    """What the enlarged `picture`, of `size` (H, W), becomes in the file `path`.

    Raises:
        UserError: the format cannot hold it, or not within `max_memory` bytes.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: no format that is written; allowed: {' '.join(SUFFIXES)}.")
    (height, width), channels = size, picture.pixels.shape[2]
    others = "--ext png or --ext tiff"
    if max(size) > FORMATS[kind]:
        raise UserError(
            f"the result has {width:,} x {height:,} pixels; {kind} holds up to {FORMATS[kind]:,} a side. Use {others}."
        )
    if kind == "jpg" and channels in (2, 4):
        raise UserError("has an alpha channel, which JPEG cannot hold. Use --ext png, webp or tiff.")
    if kind in ("jpg", "webp") and max_memory is not None and height * width * ENCODING > max_memory:
        raise UserError(
            f"the result has {width:,} x {height:,} pixels; encoding {kind} takes all of it at once, more memory than "
            f"--max-memory. Use {others}, which are written row by row."
        )
    deep = picture.pixels.dtype == np.uint16 and kind in ("png", "tiff")
    return Form(kind, height, width, channels, np.uint16 if deep else np.uint8, picture, quality, lossless)


class _Encoder(Protocol):
    def write(self, rows: Pixels) -> None: ...
    def finish(self) -> None: ...


@contextmanager
def write_picture(path: Path, form: Form) -> Iterator[_Encoder]:
    """What takes the rows of a picture, (h, W, C) at a time, from the top to the bottom.

    The file takes the place of `path` when the block ends, whole, or not at all.
    """
    with replacing(path) as file:
        kinds: dict[str, type[_PNG | _TIFF | _Whole]] = {"png": _PNG, "tiff": _TIFF}
        encoder = kinds.get(form.kind, _Whole)(file, form)
        yield encoder
        encoder.finish()


class _PNG:
    """PNG (third edition) with the filters Sub and Up, whichever makes a row's differences smaller."""

    def __init__(self, file: IO[bytes], form: Form) -> None:
        self.file, picture = file, form.picture
        depth = 8 * np.dtype(form.dtype).itemsize
        self.pixel = form.channels * np.dtype(form.dtype).itemsize
        self.above = np.zeros(form.width * self.pixel, np.uint8)
        self.packer = zlib.compressobj(COMPRESSION)
        self.packed: list[bytes] = []
        colour = {1: 0, 2: 4, 3: 2, 4: 6}[form.channels]
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", form.width, form.height, depth, colour, 0, 0, 0))
        if picture.icc is not None:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
        for name, content in picture.png_colour:
            self._chunk(name, content)
        if form.exif is not None:
            self._chunk(b"eXIf", form.exif.block())

    def _chunk(self, name: bytes, content: bytes) -> None:
        self.file.write(struct.pack(">I", len(content)) + name + content)
        self.file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(name))))

    def write(self, rows: Pixels) -> None:
        for top in range(0, len(rows), STRIP):
            self._strip(rows[top : top + STRIP])

    def _strip(self, rows: Pixels) -> None:
        raw = np.ascontiguousarray(rows, rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1)
        up = raw - np.concatenate([self.above[None], raw[:-1]])
        sub = raw.copy()
        sub[:, self.pixel :] -= raw[:, : -self.pixel]
        cost_up, cost_sub = (np.abs(each.view(np.int8).astype(np.int16)).sum(axis=1) for each in (up, sub))
        better = (cost_up <= cost_sub)[:, None]
        filtered = np.concatenate([np.where(better, np.uint8(2), np.uint8(1)), np.where(better, up, sub)], axis=1)
        self.above = raw[-1]
        self._data(self.packer.compress(filtered.tobytes()))

    def _data(self, packed: bytes, *, all_of_it: bool = False) -> None:
        self.packed.append(packed)
        if all_of_it or sum(map(len, self.packed)) > 2**20:
            self._chunk(b"IDAT", b"".join(self.packed))
            self.packed = []

    def finish(self) -> None:
        self._data(self.packer.flush(), all_of_it=True)
        self._chunk(b"IEND", b"")


class _TIFF:
    """TIFF 6.0, or BigTIFF beyond its 4 GiB: strips, differences along rows (predictor 2), deflate."""

    def __init__(self, file: IO[bytes], form: Form) -> None:
        self.file, self.form = file, form
        self.order: Literal["<", ">"] = ">" if form.exif and form.exif.order == ">" else "<"
        self.big = form.height * form.width * form.channels * np.dtype(form.dtype).itemsize > 2**32 - 2**26
        self.places: list[int] = []
        self.sizes: list[int] = []
        self.kept = np.empty((0, form.width, form.channels), form.dtype)
        file.write(self._header(0))

    def _header(self, directory: int) -> bytes:
        mark = b"II" if self.order == "<" else b"MM"
        if self.big:
            return mark + struct.pack(f"{self.order}HHHQ", 43, 8, 0, directory)
        return mark + struct.pack(f"{self.order}HI", 42, directory)

    def write(self, rows: Pixels) -> None:
        rows = np.concatenate([self.kept, rows]) if len(self.kept) else rows
        whole = len(rows) // STRIP * STRIP
        for top in range(0, whole, STRIP):
            self._strip(rows[top : top + STRIP])
        self.kept = rows[whole:].copy()

    def _strip(self, rows: Pixels) -> None:
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]
        packed = zlib.compress(differences.astype(differences.dtype.newbyteorder(self.order)).tobytes(), COMPRESSION)
        self.places.append(self.file.tell())
        self.sizes.append(len(packed))
        self.file.write(packed)

    def finish(self) -> None:
        if len(self.kept):
            self._strip(self.kept)
        self.file.write(b"\0" * (self.file.tell() % 2))
        place = self.file.tell()
        self.file.write(directory_bytes(self._tags(), self.order, place, big=self.big))
        self.file.seek(0)
        self.file.write(self._header(place))

    def _tags(self) -> Directory:
        form, number = self.form, LONG8 if self.big else 4
        bits = [8 * np.dtype(form.dtype).itemsize] * form.channels
        plain: dict[int, tuple[int, list[int]]] = {
            256: (4, [form.width]),
            257: (4, [form.height]),
            258: (SHORT, bits),
            259: (SHORT, [8]),  # deflate
            262: (SHORT, [1 if form.channels < 3 else 2]),
            273: (number, self.places),
            277: (SHORT, [form.channels]),
            278: (4, [STRIP]),
            279: (number, self.sizes),
            284: (SHORT, [1]),
            317: (SHORT, [2]),
        }
        if form.channels in (2, 4):
            plain[338] = (SHORT, [2])  # alpha that colours are not multiplied by
        tags: Directory = {tag: value(self.order, kind, *numbers) for tag, (kind, numbers) in plain.items()}
        if form.picture.icc is not None:
            tags[34675] = Value(7, len(form.picture.icc), form.picture.icc)
        return tags | (form.exif.descriptive().tags if form.exif else {})


class _Whole:
    """JPEG and WebP, by Pillow."""

    def __init__(self, file: IO[bytes], form: Form) -> None:
        self.file, self.form = file, form
        self.pixels = np.empty((form.height, form.width, form.channels), np.uint8)
        self.row = 0

    def write(self, rows: Pixels) -> None:
        self.pixels[self.row : self.row + len(rows)] = rows
        self.row += len(rows)

    def finish(self) -> None:
        form, icc = self.form, self.form.picture.icc
        image = Image.fromarray(self.pixels[..., 0] if form.channels == 1 else self.pixels)
        if form.kind == "webp" and form.channels < 3:
            image, icc = _grey_as_rgb(image, icc)
        exif = form.exif.block() if form.exif else b""
        more = {"icc_profile": icc} if icc else {}
        if form.kind == "webp":
            image.save(
                self.file, "WEBP", quality=form.quality, lossless=form.lossless, exact=form.lossless, exif=exif, **more
            )
            return
        if exif:
            more["exif"] = MARK + exif
        # Colours at half the resolution would undo a part of the enlargement
        image.save(self.file, "JPEG", quality=form.quality, subsampling=0, **more)


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


class PictureFile:
    """A picture that a thread of its own encodes and writes, while the next is computed.

    `write` and `finish` return before the rows are on disk; `result` waits, and raises what went wrong. A process that
    ends without waiting, as Ctrl-C may have it, writes what was finished and leaves nothing of the rest.
    """

    def __init__(self, path: Path, form: Form) -> None:
        self.path, self.form = path, form
        self._rows: queue.Queue[Pixels | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._given_up = False
        # (No daemon: the end of the process would kill it, with a half-written file beside its name)
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}")
        self._thread.start()

    def write(self, rows: Pixels) -> None:
        """The next rows, (h, W, C) of the form's type.

        Raises:
            UserError: it cannot be written.
        """
        self._put(rows)

    def finish(self) -> None:
        """All rows were given."""
        self._put(None)

    def result(self) -> None:
        """Wait until the file is whole and on disk.

        Raises:
            UserError: it cannot be written.
        """
        self._thread.join()
        self._raise()

    def give_up(self) -> None:
        """Leave no file, and wait until none is left."""
        self._given_up = True
        while self._thread.is_alive():
            self._put(None)
            self._thread.join(0.05)

    def _put(self, rows: Pixels | None) -> None:
        while self._thread.is_alive():
            try:
                self._rows.put(rows, timeout=0.1)
                return
            except queue.Full:
                continue
        if not self._given_up:
            self._raise()

    def _raise(self) -> None:
        if isinstance(self._error, OSError):
            raise UserError(
                f"{self.path}: cannot be written: {self._error.strerror or self._error}. Nothing of it is left."
            ) from self._error
        if self._error is not None:
            raise self._error

    def _next(self) -> Pixels | None:
        """The next rows; None after the last."""
        while True:
            try:
                return self._rows.get(timeout=0.2)
            except queue.Empty:
                if not threading.main_thread().is_alive():  # the process ends, and nobody will give the rest
                    self._given_up = True
                    return None

    def _run(self) -> None:
        try:
            with write_picture(self.path, self.form) as encoder:
                while (rows := self._next()) is not None and not self._given_up:
                    encoder.write(rows)
                if self._given_up:
                    raise InterruptedError
        except BaseException as error:
            self._error = None if self._given_up else error
