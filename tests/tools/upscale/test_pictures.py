"""Picture files of all kinds: what is read is what Pillow, OpenCV and tifffile see; what is written is read by them."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational
from skimage.data import astronaut, chelsea

from esc_arch.errors import UserError
from esc_arch.tools.upscale import image_reader, image_writer
from esc_arch.tools.upscale.image_reader import DecodedImage, inspect_image, read_image
from esc_arch.tools.upscale.image_writer import LARGEST_SIDE, encode_spec, write_image
from esc_arch.tools.upscale.metadata import Exif, Metadata, parse_exif

PHOTOGRAPH = astronaut()[30:130, 150:290]
CAT = chelsea()[60:130, 100:190]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tif"}


def deep(image: np.ndarray) -> np.ndarray:
    """16 bits whose lower halves are no copies of the upper ones."""
    noise = np.random.default_rng(0).integers(-120, 120, image.shape)
    return np.clip(image.astype(int) * 257 + noise, 0, 65535).astype(np.uint16)


def camera_data(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = orientation, "Maker", "2026:01:02 03:04:05"
    exif.get_ifd(0x8769).update({0x829A: IFDRational(1, 250), 0xA002: 140, 0xA003: 100, 0x927C: b"notes of the maker"})
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def with_alpha(colour: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, np.iinfo(colour.dtype).max, colour.shape[1]).astype(colour.dtype)
    return np.dstack([colour, np.broadcast_to(ramp, colour.shape[:2])])


def grey(colour: np.ndarray) -> np.ndarray:
    return colour[..., 1:2]


def exif_of(stored: Image.Exif) -> Exif:
    exif, notes = parse_exif(io.BytesIO(stored.tobytes()[6:]))
    assert exif is not None and not notes
    return exif


def store(path: Path, pixels: np.ndarray, orientation: int = 1) -> None:
    """A file as a camera makes it: not turned, and saying so."""
    exif = camera_data(orientation)
    if path.suffix in (".jpg", ".webp") or (path.suffix == ".png" and pixels.dtype == np.uint8):
        Image.fromarray(pixels).save(path, exif=exif, icc_profile=SRGB, quality=98)
        return
    # Pillow drops what is in inner directories when it writes TIFF, and has no colours of 16 bits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exif, "fitted", lambda self, *_: self)
        image = DecodedImage(pixels, Metadata(SRGB, exif_of(exif)))
        write_image(path, encode_spec(path, image, pixels.shape[:2]), [pixels])


def as_written(path: Path, image: DecodedImage, **options: Any) -> DecodedImage:
    """The image itself written to a file and read again."""
    rows = (image.pixels[top : top + 37] for top in range(0, len(image.pixels), 37))
    write_image(path, encode_spec(path, image, image.pixels.shape[:2], **options), rows)
    return read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("depth", [np.asarray, deep], ids=["8", "16"])
@pytest.mark.parametrize("kind", ["grey", "grey+alpha", "RGB", "RGBA"])
def test_pixels_are_kept_to_the_last_bit(tmp_path: Path, kind: str, depth: Callable[..., Any], suffix: str) -> None:
    pixels = depth(PHOTOGRAPH) if kind.startswith("RGB") else grey(depth(PHOTOGRAPH))
    pixels = with_alpha(pixels) if "A" in kind[3:] or "alpha" in kind else pixels
    path = tmp_path / f"picture{suffix}"
    again = as_written(path, DecodedImage(pixels, Metadata(SRGB)))
    assert again.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(again.pixels, pixels)
    assert again.metadata.icc == SRGB
    # ... and other programs see the same
    if suffix == ".tif":
        seen = tifffile.imread(path)
        if seen.ndim == 2:
            seen = seen[..., None]
    else:
        seen = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        seen = seen.reshape(*seen.shape[:2], -1)
        if kind == "grey+alpha":
            seen = seen[..., [0, 3]]
        elif kind != "grey":
            seen = seen[..., [2, 1, 0, 3][: seen.shape[2]]]
    np.testing.assert_array_equal(seen, pixels)
    if pixels.dtype == np.uint8:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels.squeeze())


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_of_a_pixel(tmp_path: Path, suffix: str) -> None:
    pixels = np.array([[[3, 2, 1]]], np.uint8)
    np.testing.assert_array_equal(as_written(tmp_path / f"one{suffix}", DecodedImage(pixels)).pixels, pixels)


def test_tiff_beyond_4_gib_is_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = DecodedImage(deep(PHOTOGRAPH), Metadata(SRGB, exif_of(camera_data()).fitted(100, 140)))
    path = tmp_path / "big.tif"
    assert not encode_spec(path, image, (100, 140)).is_big
    assert encode_spec(path, image, (2**15, 2**15)).is_big
    monkeypatch.setattr(image_writer, "LARGEST_CLASSIC_TIFF", 0)
    again = as_written(path, image)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        np.testing.assert_array_equal(tiff.asarray(), deep(PHOTOGRAPH))
    np.testing.assert_array_equal(again.pixels, deep(PHOTOGRAPH))
    assert again.metadata == image.metadata


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_are_near(tmp_path: Path, suffix: str) -> None:
    again = as_written(tmp_path / f"picture{suffix}", DecodedImage(PHOTOGRAPH, Metadata(SRGB)))
    assert again.metadata.icc == SRGB
    error = np.abs(again.pixels.astype(int) - PHOTOGRAPH)
    assert 0 < error.mean() < 3
    worse = as_written(tmp_path / f"worse{suffix}", DecodedImage(PHOTOGRAPH), quality=30)
    assert np.abs(worse.pixels.astype(int) - PHOTOGRAPH).mean() > 1.5 * error.mean()


def test_webp_without_loss(tmp_path: Path) -> None:
    pixels = with_alpha(PHOTOGRAPH)
    again = as_written(tmp_path / "picture.webp", DecodedImage(pixels), lossless=True)
    np.testing.assert_array_equal(again.pixels, pixels)


def test_colours_of_jpeg_have_the_full_resolution(tmp_path: Path) -> None:
    as_written(tmp_path / "picture.jpg", DecodedImage(PHOTOGRAPH))
    with Image.open(tmp_path / "picture.jpg") as image:
        assert {component[1:3] for component in image.layer} == {(1, 1)}  # type: ignore[attr-defined]


def grey_profile(gamma: float) -> bytes:
    """A profile of greys (ICC.1:2001, 6.3.3): description, white point and a tone curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"Grey\0" + bytes(78 + 1)
    tags, place, contents = [], 128 + 4 + 3 * 12, b""
    for tag, content in ((b"desc", name), (b"wtpt", white), (b"kTRC", curve)):
        content += bytes(-len(content) % 4)
        tags.append(tag + struct.pack(">II", place + len(contents), len(content)))
        contents += content
    size = place + len(contents)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02100000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    head = (head + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)).ljust(128, b"\0")
    return head + struct.pack(">I", 3) + b"".join(tags) + contents


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_profiles_of_greys_are_kept_with_greys(tmp_path: Path, suffix: str) -> None:
    again = as_written(tmp_path / f"grey{suffix}", DecodedImage(grey(PHOTOGRAPH), Metadata(grey_profile(1.8))))
    assert again.metadata.icc == grey_profile(1.8)
    assert again.pixels.shape[2] == 1


@pytest.mark.parametrize("alpha", [False, True])
def test_webp_has_no_greys_and_gets_their_profile_as_colours(tmp_path: Path, alpha: bool) -> None:
    pixels = with_alpha(grey(PHOTOGRAPH)) if alpha else grey(PHOTOGRAPH)
    again = as_written(tmp_path / "grey.webp", DecodedImage(pixels, Metadata(grey_profile(1.0))), lossless=True)
    assert again.metadata.icc is None
    linear = pixels[..., :1] / 255
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(again.pixels[..., :3] - srgb).max() < 3
    if alpha:
        np.testing.assert_array_equal(again.pixels[..., 3], pixels[..., 1])


@pytest.mark.parametrize("kind", LARGEST_SIDE)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_viewers_show_is_the_same_for_every_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    path = tmp_path / f"turned{SUFFIXES[kind]}"
    store(path, PHOTOGRAPH, orientation)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    picture = read_image(path)
    np.testing.assert_array_equal(picture.pixels, shown)
    again = tmp_path / f"again{SUFFIXES[kind]}"
    as_written(again, picture)
    with Image.open(again) as image:
        exif = image.getexif()
        assert exif[0x0112] == 1
        assert (exif[0x010F], exif[0x0132]) == ("Maker", "2026:01:02 03:04:05")
        details = exif.get_ifd(0x8769)
        assert details[0x829A] == 1 / 250
        assert details[0x927C] == b"notes of the maker"
        assert (details[0xA002], details[0xA003]) == (shown.shape[1], shown.shape[0])
        assert exif.get_ifd(0x8825)[1] == "N"
        assert image.info["icc_profile"] == SRGB
        assert np.abs(np.asarray(ImageOps.exif_transpose(image)).astype(int) - shown).mean() < 3


@pytest.mark.parametrize("to", LARGEST_SIDE)
@pytest.mark.parametrize("source", LARGEST_SIDE)
def test_camera_data_pass_from_format_to_format(tmp_path: Path, source: str, to: str) -> None:
    path = tmp_path / f"a{SUFFIXES[source]}"
    store(path, PHOTOGRAPH)
    as_written(tmp_path / f"b{SUFFIXES[to]}", read_image(path))
    with Image.open(tmp_path / f"b{SUFFIXES[to]}") as image:
        assert image.getexif()[0x010F] == "Maker"
        assert image.getexif().get_ifd(0x8769)[0x829A] == 1 / 250


@pytest.mark.parametrize("orientation", [5, 6, 8])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_turned_alike(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"deep{suffix}"
    pixels = deep(PHOTOGRAPH)
    store(path, pixels, orientation)
    plain = Image.fromarray((pixels[..., 0] // 257).astype(np.uint8))
    plain.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(plain))
    np.testing.assert_array_equal(read_image(path).pixels[..., 0] // 257, shown)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_camera_data_keep_types_and_texts(tmp_path: Path, order: str, suffix: str) -> None:
    """In both orders of bytes; Pillow alone makes bytes of what is undefined, and ASCII of texts."""
    details = Exif({0x829A: (5, IFDRational(1, 250)), 0x9286: (7, b"ASCII\0\0\0text"), 0xA002: (4, 140)})
    artist = "Müller".encode().decode("latin-1")
    tags = {0x010F: (2, "Maker"), 0x0112: (3, 1), 0x013B: (2, artist), 0x9C9B: (1, "Title".encode("utf-16le"))}
    exif = Exif(tags, {0x8769: details, 0x8825: Exif({1: (2, "N"), 2: (5, (IFDRational(1), IFDRational(2, 3)))})})
    block = exif.encode()
    if order == ">":
        seen = Image.Exif()
        seen.load(block)
        seen.get_ifd(0x8769), seen.get_ifd(0x8825)
        seen.endian = ">"
        assert exif_of(seen).tags[0x010F] == (2, "Maker")
    assert parse_exif(io.BytesIO(block)) == (exif, ())
    again = as_written(tmp_path / f"a{suffix}", DecodedImage(PHOTOGRAPH, Metadata(exif=exif)))
    assert again.metadata.exif == exif.fitted(100, 140)
    with tifffile.TiffFile(io.BytesIO(block)) as tiff:
        assert tiff.pages[0].tags[0x8769].value["UserComment"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "message"), [(b"XX*\0", "not a TIFF file"), (camera_data().tobytes()[:40], "Truncated")]
)
def test_damaged_camera_data_are_left_out_with_a_note(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PHOTOGRAPH).save(path, exif=data)
    picture = read_image(path)
    assert picture.metadata.exif is None
    assert re.search(f"EXIF data are damaged .*{message}.* left out", picture.notes[0])
    np.testing.assert_array_equal(picture.pixels, PHOTOGRAPH)


def test_directories_in_a_circle_end() -> None:
    data = b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0"
    assert parse_exif(io.BytesIO(data)) == (Exif({}, {0x8769: Exif({})}), ())


def test_camera_data_too_long_for_jpeg(tmp_path: Path) -> None:
    exif = Exif({0x010E: (2, "x" * 69999)})
    picture = DecodedImage(PHOTOGRAPH, Metadata(exif=exif))
    spec = encode_spec(tmp_path / "long.jpg", picture, (100, 140))
    assert spec.notes == ("its EXIF data are longer than JPEG holds and left out",)
    assert as_written(tmp_path / "long.jpg", picture).metadata.exif is None
    assert as_written(tmp_path / "long.png", picture).metadata.exif == exif


@pytest.mark.parametrize("to", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("source", [".png", ".jpg", ".tif", ".bmp"])
def test_the_resolution_is_kept(tmp_path: Path, source: str, to: str) -> None:
    Image.fromarray(PHOTOGRAPH).save(tmp_path / f"in{source}", dpi=(300, 150))
    as_written(tmp_path / f"out{to}", read_image(tmp_path / f"in{source}"))
    with Image.open(tmp_path / f"out{to}") as image:
        assert image.info["dpi"] == pytest.approx((300, 150), abs=0.02)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="Cat"/></x:xmpmeta>'


@pytest.mark.parametrize("to", LARGEST_SIDE)
@pytest.mark.parametrize("source", LARGEST_SIDE)
def test_xmp_is_kept(tmp_path: Path, source: str, to: str) -> None:
    """But for the orientation: the pixels are upright."""
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    path = tmp_path / f"a{SUFFIXES[source]}"
    options: dict[str, Any] = {"pnginfo": text} if source == "png" else {"xmp": XMP}
    if source == "tiff":
        options = {"tiffinfo": {0x02BC: XMP}}
    Image.fromarray(PHOTOGRAPH).save(path, **options)
    as_written(tmp_path / f"b{SUFFIXES[to]}", read_image(path))
    with Image.open(tmp_path / f"b{SUFFIXES[to]}") as image:
        image.load()
        assert image.info["xmp"] == XMP.replace(b'"6"', b'"1"')


def test_xmp_that_jpeg_cannot_hold(tmp_path: Path) -> None:
    picture = DecodedImage(PHOTOGRAPH, Metadata(xmp=bytes(70000)))
    spec = encode_spec(tmp_path / "a.jpg", picture, (100, 140))
    assert spec.notes == ("its XMP data are longer than JPEG holds and left out",)
    assert as_written(tmp_path / "a.jpg", picture).metadata.xmp is None
    extension = b"\xff\xe1" + struct.pack(">H", 40) + b"http://ns.adobe.com/xmp/extension/\0abc"
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "b.jpg", extra=extension)
    assert read_image(tmp_path / "b.jpg").notes == ("its extended XMP, beyond 64 KiB, was left out",)


def test_texts_are_kept_in_their_format_and_said_elsewhere(tmp_path: Path) -> None:
    text, png, jpeg = PngInfo(), tmp_path / "a.png", tmp_path / "a.jpg"
    text.add_text("parameters", "a prompt"), text.add_text("long", "x" * 5000, zip=True)
    text.add_itxt("Title", "Müller", lang="de")
    text.add(b"tEXt", b"behind\0the pixels", after_idat=True)
    Image.fromarray(PHOTOGRAPH).save(png, pnginfo=text)
    iptc = b"\x1c\x02\x78\0\x03cat"
    segment = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc
    extra = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    Image.fromarray(PHOTOGRAPH).save(jpeg, comment="a comment", extra=extra)
    as_written(tmp_path / "b.png", read_image(png))
    as_written(tmp_path / "b.jpg", read_image(jpeg))
    with Image.open(tmp_path / "b.png") as image:
        image.load()
        texts = image.text  # type: ignore[attr-defined]
        assert texts == {"parameters": "a prompt", "long": "x" * 5000, "Title": "Müller", "behind": "the pixels"}
    with Image.open(tmp_path / "b.jpg") as image:
        assert (image.info["comment"], image.info["photoshop"]) == (b"a comment", {0x0404: iptc})
    for source, kinds, what in ((png, ("jpg", "webp", "tiff"), "PNG text"), (jpeg, ("png", "webp"), "JPEG comment or")):
        for kind in kinds:
            (note,) = encode_spec(tmp_path / f"c.{kind}", read_image(source), (100, 140)).notes
            assert re.fullmatch(f"its {what}.* cannot be kept in {kind} and left out", note)


def test_how_a_png_says_its_colours_is_kept(tmp_path: Path) -> None:
    stored = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(stored, "PNG")
    chunk = b"gAMA" + struct.pack(">I", 100000)
    data = stored.getvalue()
    path = tmp_path / "linear.png"
    path.write_bytes(data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])
    again = as_written(tmp_path / "again.png", read_image(path))
    assert again.metadata.png_colour == ((b"gAMA", struct.pack(">I", 100000)),)
    with Image.open(tmp_path / "again.png") as image:
        assert image.info["gamma"] == 1.0


def see_through_palette() -> Image.Image:
    image = Image.fromarray(PHOTOGRAPH).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (Image.fromarray(PHOTOGRAPH).quantize(64), "RGB"),
        (see_through_palette(), "RGBA"),
        (Image.fromarray(PHOTOGRAPH).convert("1"), "L"),
        (Image.fromarray(PHOTOGRAPH).convert("LA"), "LA"),
    ],
    ids=["palette", "palette with alpha", "1 bit", "grey and alpha"],
)
def test_other_kinds_of_pixels(tmp_path: Path, image: Image.Image, mode: str) -> None:
    image.save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as stored:
        expected = np.asarray(stored.convert(mode))
    np.testing.assert_array_equal(read_image(tmp_path / "picture.png").pixels.squeeze(), expected)


@pytest.mark.parametrize("kind", ["grey", "RGB"])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_that_means_transparent(tmp_path: Path, kind: str, depth: int) -> None:
    pixels = PHOTOGRAPH if kind == "RGB" else grey(PHOTOGRAPH)
    pixels = deep(pixels) if depth == 16 else pixels
    key = pixels[50, 70]
    path = tmp_path / "keyed.png"
    as_written(path, DecodedImage(pixels))
    data = path.read_bytes()
    chunk = b"tRNS" + struct.pack(f">{len(key)}H", *key.tolist())
    place = data.index(b"IDAT") - 4
    length = struct.pack(">I", len(chunk) - 4)
    path.write_bytes(data[:place] + length + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:])
    found = read_image(path).pixels
    np.testing.assert_array_equal(found[..., :-1], pixels)
    np.testing.assert_array_equal(found[..., -1] == 0, (pixels == key).all(axis=2))


def test_cmyk_by_its_profile(tmp_path: Path) -> None:
    # No profile of CMYK comes with Pillow; one of another space is none that can be used
    image = Image.fromarray(PHOTOGRAPH).convert("CMYK")
    image.save(tmp_path / "cmyk.tif", icc_profile=LAB)
    picture = read_image(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(picture.pixels, np.asarray(image.convert("RGB")))
    assert picture.metadata.icc is None
    assert "CMYK was converted to sRGB by a plain formula" in picture.notes[0]


def test_lab_by_its_definition(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(PHOTOGRAPH), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    picture = read_image(tmp_path / "lab.tif")
    assert np.abs(picture.pixels.astype(int) - PHOTOGRAPH).max() < 12
    assert picture.notes == ("Lab was converted to sRGB",)


def test_tiffs_of_other_programs(tmp_path: Path) -> None:
    pixels, path = deep(PHOTOGRAPH), tmp_path / "other.tif"
    for options in ({}, {"compression": "zlib", "predictor": True}, {"byteorder": ">"}, {"bigtiff": True}):
        tifffile.imwrite(path, pixels, photometric="rgb", **options)
        np.testing.assert_array_equal(read_image(path).pixels, pixels)
    tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path).pixels, pixels)
    tifffile.imwrite(path, pixels[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(read_image(path).pixels[..., 0], 65535 - pixels[..., 0])
    cv2.imwrite(str(path), pixels[..., ::-1])  # LZW
    np.testing.assert_array_equal(read_image(path).pixels, pixels)


def test_colours_multiplied_by_alpha_are_divided(tmp_path: Path) -> None:
    pixels = with_alpha(deep(PHOTOGRAPH))
    alpha = pixels[..., 3:] / 65535
    stored = np.dstack([np.round(pixels[..., :3] * alpha), pixels[..., 3]]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    found = read_image(tmp_path / "a.tif").pixels
    seen = alpha[..., 0] > 0.5
    assert np.abs(found.astype(int) - pixels)[seen].max() <= 1
    assert (found[:, 0] == 0).all()


def test_telephones_pictures_of_two_are_the_first(tmp_path: Path) -> None:
    Image.fromarray(PHOTOGRAPH).save(
        tmp_path / "p.jpg", "MPO", save_all=True, append_images=[Image.fromarray(CAT)], quality=95
    )
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.format == "MPO"
        first = np.asarray(image)
    np.testing.assert_array_equal(read_image(tmp_path / "p.jpg").pixels, first)


def test_thumbnails_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "t.tif") as tiff:
        tiff.write(PHOTOGRAPH, photometric="rgb")
        tiff.write(PHOTOGRAPH[::4, ::4], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "t.tif").pixels, PHOTOGRAPH)


def test_directories_without_end(tmp_path: Path) -> None:
    """No more than some are read, pages or thumbnails; `inspect_image` reads the first."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 4), (277, 1), (278, 1), (279, 1)]
    for name, kind in (("pages", 0), ("thumbnails", 1)):
        data, count = b"II*\0\x08\0\0\0", 300
        length = 2 + 12 * (len(tags) + 1) + 4
        for index in range(count):
            data += struct.pack("<H", len(tags) + 1)
            for tag, value in [(254, kind * (index > 0)), *tags]:
                data += struct.pack("<HHII", tag, 4, 1, value)
            data += struct.pack("<I", (index < count - 1) * (8 + length * (index + 1)))
        path = tmp_path / f"{name}.tif"
        path.write_bytes(data)
        assert inspect_image(path) == ((1, 1), True)
    assert read_image(path).pixels.shape == (1, 1, 1)
    with pytest.raises(UserError, match=r"100 pages or more\. Save each as an image"):
        read_image(tmp_path / "pages.tif")


def png_of(height: int, width: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (head, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(kind: str, image: Any = None, **options: Any) -> bytes:
    stored = io.BytesIO()
    (Image.fromarray(PHOTOGRAPH) if image is None else image).save(stored, kind, **options)
    return stored.getvalue()


def tiff_of(pixels: Any, **options: Any) -> bytes:
    stored = io.BytesIO()
    tifffile.imwrite(stored, pixels, **options)
    return stored.getvalue()


DEEP_PNG = cv2.imencode(".png", deep(PHOTOGRAPH))[1].tobytes()
FRAMES = {"save_all": True, "append_images": [Image.fromarray(PHOTOGRAPH[::-1].copy())]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty. Replace it."),
        (b"no picture" * 9, "not a PNG, JPEG, WebP, TIFF, BMP or GIF image, whatever its name says, or damaged"),
        (encoded("PPM"), "not a PNG, JPEG"),
        (encoded("GIF", **FRAMES), r"animated \(2 frames\)"),
        (encoded("PNG")[:9000], r"damaged \(.*\). Replace it."),
        (DEEP_PNG[:30000], r"damaged \(.*\). Replace it."),
        (DEEP_PNG[:30000] + bytes(500) + DEEP_PNG[30500:], r"damaged \(.*\). Replace it."),
        (encoded("JPEG")[:3000], r"damaged \(.*truncated.*\). Replace it."),
        (encoded("WEBP")[:3000], r"(damaged|not a PNG)"),
        (encoded("BMP")[:3000], r"damaged \(.*\). Replace it."),
        (encoded("TIFF")[:3000], r"damaged \(.*\). Replace it."),
        (tiff_of(deep(PHOTOGRAPH), photometric="rgb")[:3000], r"damaged \(.*\). Replace it."),
        (encoded("WEBP", **FRAMES), r"animated \(2 frames\). Save the frames as images, or make a video"),
        (encoded("PNG", **FRAMES), r"animated \(2 frames\)"),
        (encoded("TIFF", **FRAMES), "2 pages. Save each as an image of its own."),
        (png_of(60000, 60000), "claims 60,000 x 60,000 pixels; up to 536,870,912 are read. Cut it"),
        (tiff_of(PHOTOGRAPH / np.float32(255), photometric="rgb"), "floating-point numbers of 32 bits. Save it with 8"),
        (tiff_of(PHOTOGRAPH[..., 0].astype(np.uint32)), "whole numbers of 32 bits"),
        (tiff_of(PHOTOGRAPH[..., 0].astype(np.int16)), "signed numbers of 16 bits"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{message}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"^{path}: a pipe, a socket or a device, not a file. Take it out"):
            read_image(path)
    with pytest.raises(UserError, match=r"a.png: cannot be read: No such file or directory\."):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r": cannot be read: Is a directory\."):
        read_image(tmp_path)


def test_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "a.png")
    monkeypatch.setattr(image_reader, "decoded", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UserError, match=r"too large for the memory here\. Cut it into parts"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", LARGEST_SIDE)
def test_pillows_limit_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = tmp_path / f"a{SUFFIXES[kind]}"
    Image.fromarray(PHOTOGRAPH).save(path)
    assert read_image(path).pixels.shape == PHOTOGRAPH.shape
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.jpg", (70000, 10), "has 10 x 70,000 pixels; jpg holds up to 65,535 a side. Use --ext png or --ext tiff"),
        ("a.webp", (10, 16384), "has 16,384 x 10 pixels; webp holds up to 16,383 a side"),
        ("a.bmp", (10, 10), "a.bmp: not a format that can be written; allowed: .png .jpg .jpeg .webp .tif .tiff"),
        ("a.jpg", (5000, 5000), "encoding jpg takes all of it at once, more memory than --max-memory"),
    ],
)
def test_what_formats_cannot_hold_is_said_before(tmp_path: Path, name: str, size: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        encode_spec(tmp_path / name, DecodedImage(PHOTOGRAPH), size, max_memory=10**8)


def test_jpeg_has_no_alpha(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has an alpha channel, which JPEG cannot hold"):
        encode_spec(tmp_path / "a.jpg", DecodedImage(with_alpha(PHOTOGRAPH)), (10, 10))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_no_half_file_is_left(tmp_path: Path, suffix: str) -> None:
    path, picture = tmp_path / f"a{suffix}", DecodedImage(PHOTOGRAPH)
    path.write_bytes(b"as it was")
    spec = encode_spec(path, picture, (100, 140))

    def interrupted() -> Iterator[np.ndarray]:
        yield PHOTOGRAPH[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image(path, spec, interrupted())
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, b"as it was")]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, spec: Any, rows: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(image_writer.ENCODERS, "png", full)
    path = tmp_path / "a.png"
    message = re.escape(f"{path}: cannot be written: No space left on device. Nothing of it is left.")
    with pytest.raises(UserError, match=message):
        write_image(path, encode_spec(path, DecodedImage(PHOTOGRAPH), (100, 140)), [PHOTOGRAPH])
    assert list(tmp_path.iterdir()) == []
