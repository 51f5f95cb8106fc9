"""HR patches for training and pairs at any scale for testing, from folders and LMDBs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.utils.matlab_functions import imresize
from torch import Tensor

from esc_arch import ArbitraryScaleDataset, UserError
from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.options.checks import check_options
from esc_arch.options.defaults import set_defaults

Options = dict[str, Any]


def options(root: Path, phase: str, **changes: Any) -> Options:
    kind = "lmdb" if root.suffix == ".lmdb" else "disk"
    return {
        "name": "Images",
        "type": "ArbitraryScaleDataset",
        "phase": phase,
        "dataroot_gt": str(root),
        "io_backend": {"type": kind},
    } | changes


def image_file(path: Path) -> Tensor:
    return torch.from_numpy(cv2.imread(str(path))[:, :, ::-1].copy()).permute(2, 0, 1).float() / 255


def contains(image: Tensor, patch: Tensor) -> bool:
    """Whether the patch, perhaps flipped and turned, is a part of the image."""
    height, width = patch.shape[1:]
    corners = image.unfold(1, height, 1).unfold(2, width, 1)[..., 0, 0]  # of all places, the first pixel
    for turns in range(4):
        for flipped in (patch.rot90(turns, (1, 2)), patch.rot90(turns, (1, 2)).flip(2)):
            for y, x in (corners == flipped[:, :1, :1]).all(0).nonzero().tolist():
                if torch.equal(image[:, y : y + height, x : x + width], flipped):
                    return True
    return False


@pytest.mark.parametrize("root", ["gt", "gt_lmdb"])
def test_patches_for_training(photographs: Any, root: str) -> None:
    dataset = build_dataset(options(getattr(photographs, root), "train", lq_size=8, scale_max=2.5))
    assert len(dataset) >= 6
    item = dataset[2]
    assert set(item) == {"gt", "gt_path"}
    assert item["gt"].shape == (3, 20, 20) and item["gt"].dtype == torch.float32


def test_patches_are_cut_flipped_and_turned(photographs: Any) -> None:
    dataset = build_dataset(options(photographs.gt, "train", lq_size=8, scale_max=2))
    image = image_file(Path(dataset[0]["gt_path"]))
    random.seed(0)
    patches = [dataset[0]["gt"] for _ in range(8)]
    assert all(contains(image, patch) for patch in patches)
    assert len({tuple(patch.flatten().tolist()) for patch in patches}) == 8
    random.seed(0)
    assert torch.equal(dataset[0]["gt"], patches[0])
    plain = build_dataset(options(photographs.gt, "train", lq_size=24, scale_max=2, use_hflip=False, use_rot=False))
    assert torch.equal(plain[0]["gt"], image)


def test_list_of_images(photographs: Any, tmp_path: Path) -> None:
    name = sorted(path.name for path in photographs.gt.iterdir())[3]
    (tmp_path / "list.txt").write_text(f"{name} (48,48,3)\n")
    given = options(photographs.gt, "train", lq_size=8, meta_info_file=str(tmp_path / "list.txt"))
    dataset = build_dataset(given)
    assert [Path(path).name for path in dataset.images.paths] == [name]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_basicsrs_loader(photographs: Any, workers: int) -> None:
    given = options(photographs.gt, "train", lq_size=8, num_worker_per_gpu=workers, batch_size_per_gpu=3)
    loader = build_dataloader(build_dataset(given), given, num_gpu=0, seed=0)
    batches = list(loader)
    assert [batch["gt"].shape for batch in batches] == [(3, 3, 32, 32)] * 2


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pairs_at_whole_scales_are_those_of_prepared_files(photographs: Any, scale: int) -> None:
    dataset = build_dataset(options(photographs.val_gt, "val", scale=scale))
    for index in range(len(dataset)):
        item = dataset[index]
        height, width = (n // scale for n in image_file(Path(item["gt_path"])).shape[1:])
        gt = image_file(Path(item["gt_path"]))[:, : height * scale, : width * scale]
        assert torch.equal(item["gt"], gt)
        expected = imresize(gt, 1 / scale).clamp(0, 1).mul(255).round()
        difference = (item["lq"] * 255 - expected).abs()
        assert difference.max() <= 1.001 and (difference > 0.5).float().mean() < 1e-3  # a tie may round either way


@pytest.mark.parametrize(
    ("scale", "lq", "gt"),
    [
        (1, (42, 54), (42, 54)),
        (2.5, (16, 21), (40, 52)),  # 52.5 is rounded to the even number
        (8, (5, 6), (40, 48)),
        ([2, 3.5], (21, 15), (42, 52)),
        (1.4, (30, 38), (42, 53)),
    ],
)
def test_pairs_at_any_scale(photographs: Any, scale: Any, lq: tuple[int, int], gt: tuple[int, int]) -> None:
    dataset = build_dataset(options(photographs.val_gt, "test", scale=scale))
    item = dataset[1]
    assert (item["lq"].shape, item["gt"].shape) == ((3, *lq), (3, *gt))
    assert item["lq_path"] == item["gt_path"]
    levels = item["lq"] * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.min() >= 0 and levels.max() <= 255.001


def test_images_too_small(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((20, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"tiny\.png has 20 x 4 pixels .*fewer than the patches of 32 x 32"):
        build_dataset(options(tmp_path, "train", lq_size=8))[0]
    with pytest.raises(UserError, match=r"tiny\.png has 20 x 4 pixels .*too few to be reduced by the scale 4\.5"):
        build_dataset(options(tmp_path, "val", scale=4.5))[0]


WRONG = [
    ("train", {"lq_size": 0}, "lq_size: 0 given; must be a positive integer"),
    ("train", {"scale_min": 0.5}, "scale_min: 0.5 given; must be a number of at least 1"),
    ("train", {"scale_max": "4"}, "scale_max: '4' given; must be a number of at least 1"),
    ("train", {"scale_min": 5}, "scale_min: 5 is larger than scale_max 4. Swap them"),
    ("train", {"lq_size": 8, "sample_q": 65}, "sample_q: 65 given; must be an integer from 1 to 64"),
    ("val", {}, "scale: None given; must be a number of at least 1, or two"),
    ("val", {"scale": 0.5}, "scale: 0.5 given; must be a number of at least 1, or two"),
    ("val", {"scale": [2, 3, 4]}, "scale: [2, 3, 4] given; must be a number of at least 1, or two"),
]


@pytest.mark.parametrize(("phase", "changes", "message"), WRONG)
def test_wrong_options(photographs: Any, phase: str, changes: Options, message: str) -> None:
    with pytest.raises(UserError) as error:
        ArbitraryScaleDataset(options(photographs.gt, phase, **changes))
    assert message in str(error.value)


def checked(train_options: Options, photographs: Any, train: Options, val: Options, **changes: Any) -> list[str]:
    opt = train_options | {"model_type": "ESCLTEModel"} | changes
    if not changes:
        del opt["scale"]
    opt["network_g"] = opt["network_g"] | {"type": "ESCLTE"}
    loading = {key: opt["datasets"]["train"][key] for key in ("num_worker_per_gpu", "batch_size_per_gpu")}
    opt["datasets"] = {
        "train": options(photographs.gt_lmdb, "train", name="Train", **loading, **train),
        "val": options(photographs.val_gt, "val", **val),
    }
    set_defaults(opt, is_train=True)
    return list(map(str, check_options(opt, is_train=True)))


def test_checks_of_option_files(train_options: Options, photographs: Any) -> None:
    assert checked(train_options, photographs, {"lq_size": 12}, {"scale": 2.5}) == []
    assert checked(train_options, photographs, {"lq_size": 12}, {"scale": [2, 3.5]}) == []
    problems = checked(train_options, photographs, {"lq_size": 12.5, "scale_min": 0}, {"scale": "2"})
    assert len(problems) == 3
    assert problems[0].startswith("datasets:train:lq_size: 12.5 given; must be a positive integer")
    assert problems[1].startswith("datasets:train:scale_min: 0 given; must be a number of at least 1")
    assert "datasets:val:scale: '2' given" in problems[2]
    (problem,) = checked(train_options, photographs, {"lq_size": 16}, {"scale": 2})
    assert "GT is 48x48, smaller than lq_size * scale_max 64" in problem


def test_its_own_scale_goes_before_that_of_the_option_file(train_options: Options, photographs: Any) -> None:
    assert checked(train_options, photographs, {"lq_size": 12}, {"scale": 2.5}, scale=2) == []
    opt = {"scale": 4, "datasets": {phase: options(photographs.gt, phase) for phase in ("val", "val_2")}}
    opt["datasets"]["val"]["scale"] = 2.5
    set_defaults(opt, is_train=True)
    assert [dataset["scale"] for dataset in opt["datasets"].values()] == [2.5, 4]


def test_range_of_scales() -> None:
    drawn = ScaleRange.of({"lq_size": 48, "scale_max": 3.99, "sample_q": None, "type": "other keys"})
    assert (drawn.hr_size, drawn.points) == (192, 48 * 48)
    assert ScaleRange(lq_size=8, sample_q=5).points == 5
