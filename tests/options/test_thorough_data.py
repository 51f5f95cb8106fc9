"""What `basicsr check` finds in data beyond the checks before every run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from PIL import Image

from esc_arch.options import CheckScope
from esc_arch.options.checks import check_sections


def png(side: int) -> bytes:
    return cv2.imencode(".png", np.full((side, side, 3), 99, np.uint8))[1].tobytes()


def write_lmdb(path: Path, entries: dict[str, bytes], listed: dict[str, int]) -> None:
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for name, content in entries.items():
            transaction.put(name.encode(), content)
    (path / "meta_info.txt").write_text("".join(f"{name}.png ({side},{side},3) 1\n" for name, side in listed.items()))


@pytest.fixture
def options(train_options: Any, work_folder: Path) -> Any:
    """Sound LMDBs, which each test spoils."""
    write_lmdb(Path("gt.lmdb"), {name: png(32) for name in "abc"}, dict.fromkeys("abc", 32))
    write_lmdb(Path("lq.lmdb"), {name: png(16) for name in "abc"}, dict.fromkeys("abc", 16))
    train = train_options["datasets"]["train"]
    train |= {"dataroot_gt": "gt.lmdb", "dataroot_lq": "lq.lmdb", "io_backend": {"type": "lmdb"}}
    del train["filename_tmpl"]
    return train_options


def check(options: Any, thorough: bool = True) -> tuple[list[str], list[str]]:
    """Errors and notes."""
    found = list(check_sections(options, True, CheckScope(thorough)))
    return [str(p) for p in found if p.severity == "error"], [str(p) for p in found if p.severity == "note"]


def again(entries: dict[str, bytes], listed: dict[str, int]) -> None:
    shutil.rmtree("lq.lmdb")
    write_lmdb(Path("lq.lmdb"), entries, listed)


def test_sound_lmdbs(options: Any) -> None:
    assert check(options) == (
        [],
        [
            "datasets:train: 3 pairs, all sizes match scale 2 and gt_size 16",
            "datasets:val: 2 pairs, all sizes match scale 2",
        ],
    )


@pytest.mark.parametrize(
    ("entries", "listed", "message"),
    [
        (
            {"a": png(16), "b": png(16)},
            dict.fromkeys("abc", 16),
            "1 of the 3 images that 'lq.lmdb' lists in meta_info.txt are missing, the first is 'c'. Create it again",
        ),
        (
            {name: png(16) for name in "abcd"},
            dict.fromkeys("abc", 16),
            "1 of the 4 images in 'lq.lmdb' are not in its meta_info.txt, the first is 'd'. Create it again",
        ),
        (
            {"a": png(16), "b": png(20), "c": png(16)},
            dict.fromkeys("abc", 16),
            "'b' in 'lq.lmdb' has 20x20 pixels, but 16x16 in meta_info.txt. Create it again: basicsr prepare",
        ),
        (
            {"a": png(16), "b": b"no picture", "c": b""},
            dict.fromkeys("abc", 16),
            "'b' in 'lq.lmdb' is not an image that OpenCV can read (10 bytes). Create it again",
        ),
    ],
)
def test_lmdbs_that_are_not_as_listed(
    options: Any, entries: dict[str, bytes], listed: dict[str, int], message: str
) -> None:
    again(entries, listed)
    assert check(options, thorough=False)[0] == []  # before a run only the lists are looked at
    problems, _ = check(options)
    assert problems[0].startswith(f"datasets:train:dataroot_lq: {message}")
    assert len(problems) == 1 + (entries.get("c") == b"")


def test_a_damaged_lmdb(options: Any) -> None:
    content = Path("lq.lmdb/data.mdb").read_bytes()
    Path("lq.lmdb/data.mdb").write_bytes(content[: len(content) // 2])
    (problem,) = check(options)[0]
    assert problem.startswith("datasets:train:dataroot_lq: 'lq.lmdb' is damaged: ") and problem.endswith("prepare")
    Path("lq.lmdb/data.mdb").write_bytes(b"nothing of the kind" * 1000)
    (problem,) = check(options)[0]
    assert problem.startswith("datasets:train:dataroot_lq: 'lq.lmdb' is damaged: data.mdb was cut short")


def test_lmdbs_of_hr_images(options: Any) -> None:
    train = options["datasets"]["train"]
    train |= {"type": "DownsampleImageDataset", "dataroot_gt": ["gt.lmdb", "lq.lmdb"], "gt_size": 16}
    del train["dataroot_lq"]
    problems, facts = check(options)
    assert problems == [] and facts[0] == "datasets:train: 6 images"
    again({"a": png(16)}, dict.fromkeys("ab", 16))
    (problem,) = check(options)[0]
    assert problem.startswith("datasets:train:dataroot_gt: 1 of the 2 images that 'lq.lmdb' lists")


def test_all_pairs_of_folders_are_measured(options: Any) -> None:
    train = options["datasets"]["train"]
    train |= {"dataroot_gt": "gt", "dataroot_lq": "lq", "io_backend": {"type": "disk"}}
    for folder, side in (("gt", 32), ("lq", 16)):
        Path(folder).mkdir()
        for number in range(100):
            Image.new("RGB", (side, side)).save(f"{folder}/{number:03}.png")
    Image.new("RGB", (18, 16)).save("lq/091.png")
    assert check(options, thorough=False)[0] == []
    problems, facts = check(options)
    assert problems == [
        "datasets:train: 1 of 100 images checked have a wrong size, the first is gt/091.png: LQ is 18x16 and GT 32x32; "
        "with scale 2 GT must be 36x32"
    ]
    assert facts == ["datasets:val: 2 pairs, all sizes match scale 2"]


def test_a_sample_of_very_many(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esc_arch.options.image_checks._IMAGES_MEASURED_AT_MOST", 2)
    train = options["datasets"]["train"]
    train |= {"dataroot_gt": "gt", "dataroot_lq": "lq", "io_backend": {"type": "disk"}}
    for folder, side in (("gt", 32), ("lq", 16)):
        Path(folder).mkdir()
        for number in range(5):
            Image.new("RGB", (side, side)).save(f"{folder}/{number}.png")
    assert check(options)[1][0].startswith("datasets:train: 5 pairs, 2 sizes checked, all match scale 2")
    Path("lq/7.png").touch()
    assert check(options)[0][0] == (
        "datasets:train: 6 files in 'lq', but 5 in 'gt'. There must be one LQ image for each GT image; "
        "7.png has no GT image"
    )
