"""Damaged and hostile pictures: what can be read is a picture, for the rest one message names the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from basicsr.data import build_dataset
from fuzzing import Tally, bounded, fuzz, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from skimage.data import astronaut

import esc_arch.data  # noqa: F401  registers data sets
from esc_arch import UserError
from esc_arch.data.image_files import read_image as read_training_image
from esc_arch.tools.upscale.image_reader import read_image

SIDE = 24
PHOTOGRAPH = np.ascontiguousarray(astronaut()[60 : 60 + SIDE, 200 : 200 + SIDE])
DEEP = PHOTOGRAPH.astype(np.uint16) * 257
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def by_pillow(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    image, exif = Image.fromarray(PHOTOGRAPH).convert(mode), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0xA002] = SIDE
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, icc_profile=ICC, **options)
    return buffer.getvalue()


def by_tifffile(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


FILES = {
    ".png": [
        by_pillow("PNG"),
        by_pillow("PNG", "P"),
        by_pillow("PNG", "1"),
        by_pillow("PNG", "LA"),
        by_pillow("PNG", "RGBA"),
        cv2.imencode(".png", DEEP)[1].tobytes(),
    ],
    ".jpg": [by_pillow("JPEG"), by_pillow("JPEG", progressive=True), by_pillow("JPEG", "CMYK"), by_pillow("JPEG", "L")],
    ".webp": [by_pillow("WEBP"), by_pillow("WEBP", "RGBA", lossless=True)],
    ".tif": [
        by_pillow("TIFF"),
        by_pillow("TIFF", compression="tiff_lzw"),
        by_pillow("TIFF", "CMYK"),
        by_tifffile(DEEP, photometric="rgb", compression="zlib", predictor=2),
        by_tifffile(DEEP, photometric="rgb", tile=(16, 16)),
        by_tifffile(DEEP[..., 0], bigtiff=True),
    ],
    ".bmp": [by_pillow("BMP")],
}


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, as far as there are chunks."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        end = at + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def damaged(suffix: str) -> st.SearchStrategy[bytes]:
    files = mutated(FILES[suffix], most=3)
    return st.one_of(files, files.map(with_checksums)) if suffix == ".png" else files


@pytest.mark.parametrize("suffix", FILES)
def test_pictures_to_enlarge(tmp_path: Path, suffix: str) -> None:
    tally, path = Tally(), tmp_path / f"picture{suffix}"

    @fuzz(50, 3000)
    @given(damaged(suffix))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with tally.example():
            try:
                picture = read_image(path)
            except UserError as error:
                assert path.name in str(error)
                raise
            height, width, channels = picture.pixels.shape
            assert height * width > 0
            assert 1 <= channels <= 4
            assert picture.pixels.dtype in (np.uint8, np.uint16)

    run()
    tally.check(f"{suffix} pictures")


@pytest.mark.parametrize("suffix", FILES)
def test_pictures_to_prepare(tmp_path: Path, suffix: str) -> None:
    tally, path = Tally(), tmp_path / f"picture{suffix}"

    @fuzz(25, 1500)
    @given(damaged(suffix))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with tally.example():
            try:
                image = read_training_image(path)
            except UserError as error:
                assert path.name in str(error)
                raise
            assert image.dtype == np.uint8
            assert image.shape[2] == 3

    run()
    tally.check(f"{suffix} files to prepare")


#: data set -> its options, for a folder with GT and one with LQ
DATA_SETS: dict[str, dict[str, Any]] = {
    "PairedImageDataset": {"dataroot_gt": "gt", "dataroot_lq": "lq", "use_hflip": True, "use_rot": True},
    "DownsampleImageDataset": {"dataroot_gt": "gt"},
    "ArbitraryScaleDataset": {"dataroot_gt": "gt", "lq_size": 4, "scale_max": 2},
    "SingleImageDataset": {"dataroot_lq": "gt"},
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_images_to_train_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, side in (("gt", SIDE), ("lq", SIDE // 2)):
        Path(folder).mkdir()
        cv2.imwrite(f"{folder}/image.png", PHOTOGRAPH[:side, :side])
    data_set = build_dataset(
        {"name": "Train", "type": name, "phase": "train", "scale": 2, "gt_size": 8, "io_backend": {"type": "disk"}}
        | DATA_SETS[name]
    )
    tally, path = Tally(), Path("gt/image.png")  # whatever it holds: decoders go by the content

    @fuzz(25, 1500)
    @given(st.one_of(*map(damaged, FILES)))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with tally.example():
            try:
                item = data_set[0]
            except UserError as error:
                assert "image.png" in str(error)
                raise
            assert all(entry.ndim == 3 for key, entry in item.items() if not key.endswith("path"))

    run()
    tally.check(name)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size, and holds a row."""
    data = zlib.compress(bytes(100))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_size(width: int, height: int) -> bytes:
    """The same as TIFF."""
    data = bytearray(by_tifffile(DEEP, photometric="rgb"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]
        for code, value in ((256, width), (257, height)):
            size = {3: "H", 4: "I"}[tags[code].dtype]
            struct.pack_into(f"<{size}", data, tags[code].valueoffset, value & (2 ** (8 * struct.calcsize(size)) - 1))
    return bytes(data)


def zeros_in(kind: str) -> Callable[[], bytes]:
    """A text or profile chunk of a PNG that swells when it is unpacked, from 100 KB to 100 MB."""

    def make() -> bytes:
        packed = zlib.compress(bytes(100 << 20))
        head = {"zTXt": b"Comment\0\0", "iCCP": b"ICC profile\0\0", "iTXt": b"Comment\0\1\0\0\0"}[kind]
        name, content = kind.encode(), head + packed
        chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        data = FILES[".png"][4]
        return data[:33] + chunk + data[33:]

    return make


SWELLING: dict[str, tuple[str, Callable[[], bytes]]] = {
    "the largest PNG": (".png", lambda: png_of_size(2**31 - 1, 2**31 - 1)),
    "a PNG of 4 GB": (".png", lambda: png_of_size(40_000, 40_000)),
    "a PNG within the limit": (".png", lambda: png_of_size(22_000, 22_000)),
    "the largest TIFF": (".tif", lambda: tiff_of_size(2**32 - 1, 2**32 - 1)),
    "a TIFF within the limit": (".tif", lambda: tiff_of_size(22_000, 22_000)),
}


@pytest.mark.parametrize("name", SWELLING)
def test_pictures_that_claim_to_be_large(tmp_path: Path, name: str) -> None:
    suffix, make = SWELLING[name]
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(make())
    for read in (read_image, read_training_image):
        with bounded(), pytest.raises(UserError, match=rf"picture\{suffix}"):
            read(path)


@pytest.mark.parametrize("chunk", ["zTXt", "iCCP", "iTXt"])
def test_chunks_that_swell(tmp_path: Path, chunk: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(zeros_in(chunk)())
    with bounded():
        try:
            assert read_image(path).pixels.shape == (SIDE, SIDE, 4)
        except UserError as error:
            assert "picture.png" in str(error)
