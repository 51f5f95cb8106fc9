"""Pairs made while training are those of prepared data."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.registry import DATASET_REGISTRY
from skimage import data

from esc_arch.data import DownsampleImageDataset
from esc_arch.data.image_files import folder_sources
from esc_arch.data.prepare import prepare_train
from esc_arch.errors import UserError

SCALES = (2, 3, 4)
#: In levels: how far two orders of float32 sums may be apart, on either side of a rounding.
TIE = 2e-3

Options = dict[str, Any]


@pytest.fixture(scope="module")
def hr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cuts of a photograph, of sizes that no scale divides."""
    folder = tmp_path_factory.mktemp("hr")
    photograph = data.astronaut()[:, :, ::-1]
    cv2.imwrite(str(folder / "one.png"), photograph[:101, 200:325])
    cv2.imwrite(str(folder / "two.png"), photograph[100:197, 150:247])
    return folder


def options(folder: Path, scale: int, **changes: Any) -> Options:
    opt: Options = {"name": "HR", "type": "DownsampleImageDataset", "dataroot_gt": str(folder), "scale": scale}
    return opt | {"phase": "train", "gt_size": 8 * scale, "io_backend": {"type": "disk"}} | changes


def exact_lr(image: np.ndarray[Any, Any], scale: int) -> np.ndarray[Any, Any]:
    """The whole image's LR image by BasicSR's MATLAB bicubic, cropped to a multiple, in levels, not rounded."""
    height, width = (size // scale * scale for size in image.shape[:2])
    return imresize(image[:height, :width].astype(np.float32) / 255, 1 / scale) * 255


def test_is_registered() -> None:
    assert DATASET_REGISTRY.get("DownsampleImageDataset") is DownsampleImageDataset


@pytest.mark.parametrize("scale", SCALES)
def test_patches_are_cuts_of_the_whole_lr_image(scale: int, hr_folder: Path) -> None:
    """At every place, borders and corners included; before rounding within 1e-6 (of 1), and after it but for ties."""
    rounded, unrounded = (
        DownsampleImageDataset(options(hr_folder, scale, round_lq=round_lq)) for round_lq in (True, False)
    )
    image = rounded.images.read(0)
    height, width = (size // scale for size in image.shape[:2])
    lr = exact_lr(image, scale)
    size = 6
    for top in {0, 1, 2, 3, height // 2, height - size - 1, height - size}:
        for left in {0, 1, 2, width // 2, width - size - 1, width - size}:
            place = [scale * number for number in (top, left, size, size)]
            cropped = image[: height * scale, : width * scale]
            gt, exact = unrounded.cut(cropped, *place)
            wanted = lr[top : top + size, left : left + size]
            assert np.abs(exact * 255 - wanted).max() < 255e-6
            assert np.array_equal(np.round(gt * 255), cropped[place[0] :, place[1] :][: place[2], : place[3]])
            lq = rounded.cut(cropped, *place)[1] * 255
            tie = np.abs(wanted - np.floor(wanted) - 0.5) < TIE
            assert np.array_equal(np.round(lq[~tie]), wanted.clip(0, 255).round()[~tie])
            assert np.abs(lq - np.round(lq)).max() < 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_same_pairs_as_prepared_data(scale: int, hr_folder: Path, tmp_path: Path) -> None:
    """With the same seeds, PairedImageDataset reads from an LMDB of the whole images what is made here."""
    sources = folder_sources(hr_folder)
    lmdbs = prepare_train(sources, tmp_path, "whole", scales=[scale], crop_size=10 * 12, overlap=0)
    shared: Options = {"scale": scale, "phase": "train", "gt_size": 8 * scale, "use_hflip": True, "use_rot": True}
    roots = {"dataroot_gt": str(lmdbs[1]), "dataroot_lq": str(lmdbs[scale])}
    paired = PairedImageDataset(shared | roots | {"io_backend": {"type": "lmdb"}})
    made = DownsampleImageDataset(shared | {"dataroot_gt": str(lmdbs[1]), "io_backend": {"type": "lmdb"}})
    # A side below 120 pixels is one sub-image of that length; of a longer one the last few pixels are in another
    names = [name for name in made.images.paths if name.startswith("two")]
    assert names == ["two_s001"]
    index = made.images.paths.index("two_s001")
    ties = 0
    for seed in range(30):
        random.seed(seed)
        ours = made[index]
        random.seed(seed)
        theirs = paired[index]
        assert torch.equal(ours["gt"], theirs["gt"])
        assert ours["lq"].shape == theirs["lq"].shape == (3, 8, 8)
        different = (ours["lq"] - theirs["lq"]).abs() * 255
        assert different.max() < 1.01
        ties += int((different > 0.5).sum())
    assert ties <= 3  # of 5760 values


@pytest.mark.parametrize("scale", SCALES)
def test_validation_takes_whole_images(scale: int, hr_folder: Path) -> None:
    dataset = DownsampleImageDataset(options(hr_folder, scale, phase="val"))
    assert len(dataset) == 2
    item = dataset[0]
    image = cv2.imread(str(hr_folder / "one.png"))
    height, width = (size // scale for size in image.shape[:2])
    assert item["gt"].shape == (3, height * scale, width * scale) and item["lq"].shape == (3, height, width)
    rgb = np.ascontiguousarray(image[: height * scale, : width * scale, ::-1].transpose(2, 0, 1))
    assert torch.equal(item["gt"], torch.from_numpy(rgb).float() / 255)
    wanted = exact_lr(image, scale)[:, :, ::-1].transpose(2, 0, 1).clip(0, 255)
    assert np.abs(item["lq"].numpy() * 255 - wanted).max() < 0.5 + TIE
    assert item["gt_path"] == item["lq_path"] == str(hr_folder / "one.png")


def test_augmentation(hr_folder: Path) -> None:
    """All eight ways to flip and turn, LQ and GT alike; none without the options."""
    scale = 2

    def ways(**changes: Any) -> int:
        dataset = DownsampleImageDataset(options(hr_folder, scale, gt_size=96, round_lq=False, **changes))
        found: list[torch.Tensor] = []
        for seed in range(40):
            random.seed(seed)
            item = dataset[1]  # 97 x 97: there is one patch
            if not any(torch.equal(item["gt"], other) for other in found):
                found.append(item["gt"])
                reduced = imresize(item["gt"].permute(1, 2, 0).numpy(), 1 / scale)
                assert np.abs(item["lq"].permute(1, 2, 0).numpy() - reduced).max() < 1e-6
        return len(found)

    assert ways() == 8
    assert ways(use_hflip=False, use_rot=False) == 1
    assert ways(use_rot=False) == 2


def test_items_of_a_loader_with_workers(hr_folder: Path) -> None:
    opt = options(hr_folder, 4, batch_size_per_gpu=2, num_worker_per_gpu=1)
    (batch,) = build_dataloader(build_dataset(opt), opt, num_gpu=0, seed=0)
    assert batch["lq"].shape == (2, 3, 8, 8) and batch["gt"].shape == (2, 3, 32, 32)
    assert batch["lq"].dtype == torch.float32 and sorted(map(len, batch)) == [2, 2, 7, 7]


@pytest.mark.parametrize("io_backend", ["disk", "lmdb"])
def test_training(
    io_backend: str, train_options: Options, photographs: Any, hr_folder: Path, run_basicsr: Callable[..., Any]
) -> None:
    roots = {"disk": [str(photographs.gt), str(hr_folder)], "lmdb": [str(photographs.gt_lmdb)]}[io_backend]
    common = {"type": "DownsampleImageDataset", "io_backend": {"type": io_backend}}
    train_set = {key: train_options["datasets"]["train"][key] for key in ("gt_size", "batch_size_per_gpu")}
    train_options["datasets"] = {
        "train": train_set | common | {"dataroot_gt": roots, "num_worker_per_gpu": 0},
        "val": common | {"name": "Cuts", "dataroot_gt": str(photographs.val_gt), "io_backend": {"type": "disk"}},
    }
    result = run_basicsr("train", train_options)
    assert result.status == 0, result.err
    assert f"Number of train images: {8 if io_backend == 'disk' else 6}" in result.log()
    assert "Validation Cuts" in result.log()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataroot_gt": "nowhere"}, "datasets:train:dataroot_gt: 'nowhere' given, but there is no "),
        (
            {"dataroot_gt": None},
            "datasets:train:dataroot_gt: None given; must be a folder or an LMDB, or a list",
        ),
        ({"dataroot_gt": [3]}, "datasets:train:dataroot_gt: [3] given; must be a folder or an LMDB, or a list of them"),
        ({"gt_size": None}, "datasets:train:gt_size: None given; must be a positive integer"),
        ({"gt_size": 9}, "datasets:train:gt_size: 9 given; must be divisible by scale 2"),
        ({"gt_size": 64}, "6 of 6 images checked have a wrong size, the first is "),
        ({"gt_size": 64}, "train0.png: GT is 48x48, smaller than gt_size 64"),
        ({"meta_info_file": ["a.txt"]}, "datasets:train:meta_info_file: 'a.txt' given, but there is no file"),
        ({"io_backend": {"type": "lmdb"}}, "with io_backend type lmdb its name must end with .lmdb"),
    ],
    ids=str,
)
def test_option_problems(
    changes: Options, message: str, train_options: Options, photographs: Any, run_basicsr: Callable[..., Any]
) -> None:
    train_set = train_options["datasets"]["train"]
    for key in ("dataroot_lq", "filename_tmpl"):
        del train_set[key]
    train_set |= {"type": "DownsampleImageDataset", "dataroot_gt": str(photographs.gt)} | changes
    result = run_basicsr("train", train_options)
    assert result.status == 2 and not result.experiment().exists()
    assert message in result.err


def test_too_small_lmdb_entries(train_options: Options, photographs: Any, run_basicsr: Callable[..., Any]) -> None:
    train_set = train_options["datasets"]["train"]
    train_set |= {"type": "DownsampleImageDataset", "dataroot_gt": [str(photographs.gt_lmdb)], "gt_size": 50}
    train_set["io_backend"] = {"type": "lmdb"}
    result = run_basicsr("train", train_options)
    assert result.status == 2
    assert f"train0_s001 in {photographs.gt_lmdb}: GT is 48x48, smaller than gt_size 50" in result.err


def test_too_small_image_found_while_training(hr_folder: Path) -> None:
    dataset = DownsampleImageDataset(options(hr_folder, 2, gt_size=100))
    assert dataset[0]["gt"].shape == (3, 100, 100)
    with pytest.raises(UserError, match=re.escape(f"{hr_folder / 'two.png'} has 96 x 96 pixels")):
        dataset[1]
