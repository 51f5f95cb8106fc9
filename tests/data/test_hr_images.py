"""HR images from folders, lists and LMDBs: which, in which order, and what is said when they cannot be read."""

from __future__ import annotations

import pickle
import random
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from esc_arch.data.hr_images import HRImages, random_start
from esc_arch.data.image_files import Source
from esc_arch.data.prepare import prepare_train
from esc_arch.errors import UserError


def image_of(level: int, height: int = 12, width: int = 16) -> Any:
    return np.full((height, width, 3), (level, level + 1, level + 2), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder and in folders in it, hidden files, and others."""
    root = tmp_path / "images"
    for level, name in enumerate(["b.png", "a.PNG", "0002/x y.bmp", "0001/c.png"], start=10):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), image_of(level))
    for name in (".hidden.png", "notes.txt", ".folder/d.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.fixture
def lmdb(tmp_path: Path) -> Path:
    """Two images of other levels."""
    return lmdb_of(tmp_path, "first", [50, 51])


def lmdb_of(folder: Path, name: str, levels: list[int]) -> Path:
    sources = [Source(f"{level}.png", (lambda level=level: image_of(level)), (level,)) for level in levels]
    return prepare_train(sources, folder, name, scales=[2], crop_size=12, overlap=0)[1]


def levels_of(images: HRImages) -> list[int]:
    return [int(images.read(index)[0, 0, 0]) for index in range(len(images))]


def test_folder(folder: Path) -> None:
    images = HRImages({"dataroot_gt": str(folder)})
    names = ["0001/c.png", "0002/x y.bmp", "a.PNG", "b.png"]
    assert images.paths == [str(folder / name) for name in names]
    assert len(images) == 4 and levels_of(images) == [13, 12, 11, 10]


def test_read(folder: Path) -> None:
    images = HRImages({"dataroot_gt": str(folder), "io_backend": {"type": "disk"}})
    image = images.read(0)
    assert image.shape == (12, 16, 3) and image.dtype == np.uint8
    assert np.array_equal(image[0, 0], [13, 14, 15])  # BGR
    cv2.imwrite(str(folder / "0001/c.png"), np.full((4, 4), 7, np.uint8))
    assert np.array_equal(images.read(0), np.full((4, 4, 3), 7))


def test_lmdb(lmdb: Path) -> None:
    images = HRImages({"dataroot_gt": str(lmdb), "io_backend": {"type": "lmdb"}})
    assert images.paths == ["50_s001", "50_s002", "51_s001", "51_s002"]
    assert levels_of(images) == [50, 50, 51, 51]


def test_several_lmdbs_with_equal_keys(tmp_path: Path, lmdb: Path) -> None:
    second = lmdb_of(tmp_path, "second", [51, 52])
    (tmp_path / "other").mkdir()
    third = lmdb_of(tmp_path / "other", "first", [50])
    cv2.imwrite(str(tmp_path / "50.png"), image_of(0))
    images = HRImages({"dataroot_gt": [str(lmdb), str(second), str(third)], "io_backend": {"type": "lmdb"}})
    assert levels_of(images) == [50, 50, 51, 51, 51, 51, 52, 52, 50, 50]


def test_lists(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    cv2.imwrite(str(other / "z.png"), image_of(80))
    listed = tmp_path / "list.txt"
    listed.write_text("b.png (12,16,3) 1\n\n0001/c.png\n")
    one = HRImages({"dataroot_gt": str(folder), "meta_info_file": str(listed)})
    assert levels_of(one) == [10, 13]
    two = HRImages({"dataroot_gt": [str(folder), str(other)], "meta_info_file": [str(listed), None]})
    assert levels_of(two) == [10, 13, 80]


@pytest.mark.parametrize("read_first", [False, True])
def test_can_be_handed_to_workers(read_first: bool, lmdb: Path) -> None:
    images = HRImages({"dataroot_gt": str(lmdb), "io_backend": {"type": "lmdb"}})
    if read_first:
        images.read(0)
    assert levels_of(pickle.loads(pickle.dumps(images))) == [50, 50, 51, 51]
    assert levels_of(images) == [50, 50, 51, 51]


def test_options_are_not_changed(lmdb: Path) -> None:
    opt = {"dataroot_gt": str(lmdb), "io_backend": {"type": "lmdb"}}
    for _ in range(2):  # BasicSR's data sets take the type out when they first read
        assert levels_of(HRImages(opt)) == [50, 50, 51, 51]
    assert opt == {"dataroot_gt": str(lmdb), "io_backend": {"type": "lmdb"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataroot_gt": None}, "dataroot_gt is missing. Give the folder"),
        ({"dataroot_gt": "nowhere"}, "nowhere is not a folder. Relative paths start in the current folder."),
        ({"dataroot_gt": ["{}/images", "{}/empty"]}, "{}/empty holds no image (.png"),
        ({"meta_info_file": ["{}/list.txt"] * 2}, "['{}/list.txt', '{}/list.txt'], for 1 entries of dataroot_gt. Give"),
        ({"meta_info_file": 3}, "meta_info_file is 3, for 1 entries of dataroot_gt. Give a text file for each"),
        ({"meta_info_file": "{}/no.txt"}, "Cannot read the list of images {}/no.txt: No such file"),
        ({"meta_info_file": "{}/list.txt"}, "{}/images holds no image"),
        ({"io_backend": {"type": "lmdb"}}, "{}/images is not an LMDB that BasicSR can read: a folder NAME.lmdb"),
    ],
    ids=str,
)
def test_unusable(changes: dict[str, Any], message: str, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n")

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(entry) for entry in value]
        return value.replace("{}", str(tmp_path)) if isinstance(value, str) else value

    opt = {"dataroot_gt": str(folder)} | {key: placed(value) for key, value in changes.items()}
    with pytest.raises(UserError, match=re.escape(placed(message))):
        HRImages(opt)


def test_damaged_and_vanished_images_are_named(folder: Path) -> None:
    images = HRImages({"dataroot_gt": str(folder)})
    (folder / "b.png").write_bytes(b"no image")
    (folder / "a.PNG").unlink()
    with pytest.raises(UserError, match=re.escape(f"{folder / 'b.png'} is not an image that OpenCV can read")):
        images.read(3)
    with pytest.raises(UserError, match=re.escape(f"Cannot read the image {folder / 'a.PNG'}")):
        images.read(2)


def test_damaged_lmdb_entry_is_named(tmp_path: Path, lmdb: Path) -> None:
    second = lmdb_of(tmp_path, "second", [60])
    with open(second / "meta_info.txt", "a") as lines:
        lines.write("gone.png (12,12,3) 1\n")
    images = HRImages({"dataroot_gt": [str(lmdb), str(second)], "io_backend": {"type": "lmdb"}})
    with pytest.raises(UserError, match=re.escape(f"{second} has no image 'gone'")):
        images.read(6)


def test_random_start() -> None:
    random.seed(0)
    image = image_of(0, height=13, width=20)
    starts = {random_start(image, 8, 4, "a.png") for _ in range(200)}
    assert starts == {(top, left) for top in (0, 4) for left in (0, 4, 8, 12)}
    assert random_start(image_of(0, 8, 8), 8, 4, "a.png") == (0, 0)


def test_too_small_for_a_patch() -> None:
    with pytest.raises(UserError, match=re.escape("a.png has 12 x 16 pixels (height x width), fewer than the patches")):
        random_start(image_of(0), 14, 2, "a.png")
