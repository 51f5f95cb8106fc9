"""Images and LMDBs as nobody should have them: read as what they are, or one message that names them; never a crash."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.utils import FileClient, imfrombytes
from PIL import Image

from esc_arch import UserError
from esc_arch.data import decoding
from esc_arch.data.decoding import size_in_header
from esc_arch.data.image_files import read_image
from esc_arch.data.lmdb_check import lmdb_problem

LONG = "ESC_ARCH_LONG" in os.environ

SIZE = (24, 32)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
FLAT = [Image.fromarray(np.full((*SIZE, 3), level, np.uint8)) for level in (10, 200)]


def pillow(kind: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opencv(suffix: str, image: Any) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


PICTURE = Image.fromarray(RGB)
KINDS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
WHOLE = {kind: pillow(kind, PICTURE) for kind in KINDS}
DEEP = RGB[..., ::-1].astype(np.uint16) * 257

#: Odd, but images: (H, W, 3) of uint8, as the network takes them; and how far they may be from the picture, in levels.
ODD = {
    "16 bit PNG": (opencv(".png", DEEP), 0),
    "16 bit TIFF": (opencv(".tiff", DEEP), 0),
    "palette": (pillow("PNG", PICTURE.convert("P")), 30),
    "palette with transparency": (pillow("PNG", PICTURE.convert("P"), transparency=3), 30),
    "black and white": (pillow("PNG", PICTURE.convert("1")), 255),
    "grey with alpha": (pillow("PNG", PICTURE.convert("LA")), 255),
    "CMYK JPEG": (pillow("JPEG", PICTURE.convert("CMYK"), quality=100, subsampling=0), 30),
    "CMYK TIFF": (pillow("TIFF", PICTURE.convert("CMYK")), 0),
}
ANIMATED = {
    kind: pillow(kind, FLAT[0], save_all=True, append_images=FLAT[1:]) for kind in ("GIF", "PNG", "WEBP", "TIFF")
}


def png_of(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_size(kind: str, width: int, height: int) -> bytes:
    """An image file whose header claims another size."""
    content = bytearray(WHOLE[kind])
    if kind == "JPEG":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif kind == "PPM":
        return bytes(content).replace(b"32 24", b"%d %d" % (width, height))
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


HUGE = {
    "PNG": png_of(30_000, 30_000),
    "PNG beyond all": png_of(2**31 - 1, 2**31 - 1),
    "JPEG": with_size("JPEG", 65_000, 65_000),
    "BMP": with_size("BMP", 60_000, 60_000),
    "PPM": with_size("PPM", 60_000, 60_000),
    "GIF": with_size("GIF", 65_000, 65_000),
}
DAMAGED = {
    "no byte": b"",
    "one byte": b"\x89",
    "web page": b"<!DOCTYPE html><html>Sign in</html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "signature of PNG alone": b"\x89PNG\r\n\x1a\n",
    "no pixels": png_of(0, 10),
    **{f"{kind} cut short": content[: len(content) * 2 // 3] for kind, content in WHOLE.items()},
    "JPEG without its last bytes": WHOLE["JPEG"][:-10],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_read_as_8_bit_colour(name: str) -> None:
    content, tolerance = ODD[name]
    image = imfrombytes(content)
    assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
    assert np.abs(image[..., ::-1].astype(int) - RGB).mean() <= tolerance


@pytest.mark.parametrize("kind", ANIMATED)
def test_of_animations_the_first_picture_is_read(kind: str) -> None:
    image = imfrombytes(ANIMATED[kind])
    assert image.shape == (*SIZE, 3)
    assert np.abs(image.astype(int) - 10).max() <= 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".txt", ""])
def test_the_suffix_says_nothing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(WHOLE["BMP"])
    np.testing.assert_array_equal(imfrombytes(FileClient("disk").get(path))[..., ::-1], RGB)


@pytest.mark.parametrize("name", [*HUGE, *DAMAGED])
def test_unusable_images_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes((HUGE | DAMAGED)[name])
    for read in (lambda: imfrombytes(FileClient("disk").get(path), float32=True), lambda: read_image(path)):
        with pytest.raises(
            UserError, match=r"a\.png (is not an image that OpenCV|is cut short|has [\d,]+ x )"
        ) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HUGE)
def test_huge_images_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(UserError, match=r"x [\d,]+ pixels by its header, more than the 268,435,456 that are read"):
        imfrombytes(HUGE[name])


def test_the_limit_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "767")
    with pytest.raises(UserError, match=r"has 32 x 24 pixels.*set OPENCV_IO_MAX_IMAGE_PIXELS in the environment"):
        imfrombytes(WHOLE["PNG"])
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "768")
    assert imfrombytes(WHOLE["PNG"]).shape == (*SIZE, 3)
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "many")
    assert decoding.most_pixels() == 2**28


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_told_by_the_header(kind: str) -> None:
    assert size_in_header(WHOLE[kind]) == SIZE
    assert size_in_header(b"nothing") is None


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [HUGE["PNG"], DAMAGED["JPEG cut short"]], ids=["huge", "cut short"])
def test_a_run_ends_with_one_message(
    content: bytes, workers: int, phase: str, run_basicsr: Any, train_options: Any, work_folder: Path
) -> None:
    """Behind the images whose sizes are looked at before the run."""
    for kind in ("lq", "gt"):
        (work_folder / kind).mkdir()
        side = 48 if kind == "gt" else 24
        for index in range(65):
            cv2.imwrite(str(work_folder / kind / f"{index:02}.png"), np.full((side, side, 3), 99, np.uint8))
        (work_folder / kind / "99.png").write_bytes(content)
        train_options["datasets"][phase][f"dataroot_{kind}"] = kind
    del train_options["datasets"][phase]["filename_tmpl"]
    train_options["datasets"]["train"] |= {"num_worker_per_gpu": workers}
    train_options["train"]["total_iter"] = 40
    train_options["val"]["val_freq"] = 2
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert "99.png" in run.err[run.err.index("basicsr train: ") :]
    assert "Traceback" not in run.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=rf"Cannot read the image '{path}': it is a folder, a pipe or a device"):
            FileClient("disk").get(path)


def test_a_file_too_long_for_opencv(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match=r"a\.png': it has 2,147,483,648 bytes, more than OpenCV decodes"):
        FileClient("disk").get(path)


# --- LMDBs ----------------------------------------------------------------------------------------------------------


def make_lmdb(path: Path, entries: int = 300) -> Path:
    """Of several levels, with small values in the pages of keys and large ones in pages of their own."""
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for index in range(entries):
            transaction.put(b"%06d_with_a_long_name" % index, b"x" * (9000 if index % 3 else 60))
    (path / "meta_info.txt").write_text("".join(f"{i:06}_with_a_long_name.png (8,8,3) 1\n" for i in range(entries)))
    return path


def test_sound_lmdbs_are_sound(tmp_path: Path, photographs: Any) -> None:
    for path in (make_lmdb(tmp_path / "a.lmdb"), photographs.gt_lmdb):
        assert lmdb_problem(path) is None
    lmdb.open(str(tmp_path / "empty.lmdb")).close()
    assert lmdb_problem(tmp_path / "empty.lmdb") is None


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_an_lmdb_cut_short(kept: float, tmp_path: Path) -> None:
    """LMDB alone would end the process with SIGBUS."""
    path = make_lmdb(tmp_path / "a.lmdb") / "data.mdb"
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(
        UserError, match=r"Cannot open the LMDB .*a\.lmdb: data\.mdb was cut short or is.*Create it again"
    ):
        FileClient("lmdb", db_paths=str(path.parent))


def test_an_lmdb_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    with lmdb.open(str(path), map_size=2**20, max_dbs=2) as environment:
        environment.open_db(b"inner", dupsort=True)
    assert lmdb_problem(path) is None  # which is an entry like others to BasicSR
    assert "data.mdb: No such file" in str(lmdb_problem(tmp_path))


@pytest.mark.timeout(3000 if LONG else 300)
def test_a_damaged_lmdb_never_ends_the_process(tmp_path: Path) -> None:
    """Bytes of the pages of keys are changed at random; reading all of it gives values, or a message."""
    path = make_lmdb(tmp_path / "a.lmdb") / "data.mdb"
    sound = path.read_bytes()
    with lmdb.open(str(path.parent), readonly=True, lock=False) as environment:
        size = environment.stat()["psize"]
    pages = [
        start for start in range(0, len(sound), size) if struct.unpack_from("<H", sound, start + 10)[0] in (1, 2, 8)
    ]
    assert len(pages) > 6
    drawn = random.Random(0)
    ends = {"read": 0, "told": 0}
    for _ in range(1000 if LONG else 20):
        damaged = bytearray(sound)
        for _ in range(drawn.choice([1, 4, 64])):
            # Headers and what follows them are where it hurts
            place = drawn.choice(pages) + drawn.choice([drawn.randrange(160), drawn.randrange(size)])
            damaged[place] = drawn.choice([0, 1, 127, 255, drawn.randrange(256)])
        path.write_bytes(damaged)
        ends[_read_in_fork(path.parent)] += 1
    assert min(ends.values()) > 0, ends


def _read_in_fork(path: Path) -> str:
    """`read` or `told`; a process of its own would take seconds to start."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            client = FileClient("lmdb", db_paths=str(path))
            for index in range(300):
                client.get(f"{index:06}_with_a_long_name")
            status = 0
        except UserError:
            status = 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"ended by signal {os.WTERMSIG(status)}"
    return {0: "read", 2: "told"}[os.WEXITSTATUS(status)]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "''"),
        ("k" * 600, "but its meta_info"),
        ("é", "ascii"),
        ("no\nsuch", r"no\\\\nsuch.*but its meta_info"),
    ],
    ids=["empty", "long", "not ASCII", "newline"],
)
def test_keys_that_an_lmdb_cannot_have(key: str, message: str, tmp_path: Path) -> None:
    client = FileClient("lmdb", db_paths=str(make_lmdb(tmp_path / "a.lmdb", 3)))
    with pytest.raises(UserError, match=message) as error:
        client.get(key)
    assert "\n" not in str(error.value)


def test_a_list_that_is_no_text(run_basicsr: Any, train_options: Any, photographs: Any, work_folder: Path) -> None:
    listed = work_folder / "list.txt"
    listed.write_bytes(b"train0.png (48,48,3)\n\xff\xfe.png\n")
    train_options["datasets"]["val"] = {
        "name": "Listed", "type": "SingleImageDataset", "dataroot_lq": str(photographs.gt),
        "meta_info_file": str(listed),
    }  # fmt: skip
    train_options["val"].pop("metrics")
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert "1 of 2 images are missing" in run.err and "Traceback" not in run.err
