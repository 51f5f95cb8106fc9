"""Metrics that cannot be computed of an image: found before a run where that can be, and never the end of one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils.registry import DATASET_REGISTRY, METRIC_REGISTRY
from conftest import NETWORK

import esc_arch
from esc_arch.cli import main
from esc_arch.errors import UserError
from esc_arch.models.metrics import image_measured, measure, needs_ground_truth, too_small

Options = dict[str, Any]
MODELS = ("SRModel", "ESCModel")
NIQE = {"type": "calculate_niqe", "crop_border": 0, "better": "lower"}


def noise(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "border", "least"),
    [
        ("calculate_psnr", 0, (1, 1)),
        ("calculate_psnr", 4, (9, 9)),
        ("calculate_ssim", 0, (11, 11)),
        ("calculate_ssim", 3, (17, 17)),
        ("calculate_niqe", 0, (96, 192)),
        ("calculate_niqe", 2, (196, 100)),
    ],
)
def test_the_smallest_images(kind: str, border: int, least: tuple[int, int]) -> None:
    """What is called large enough has a finite metric, and with a row or column less it has none."""
    metric = {"type": kind, "crop_border": border}
    image = noise(*least)
    other = 255 - image
    assert too_small(metric, *least) is None
    assert math.isfinite(calculate_metric({"img": image, "img2": other}, metric))
    for height, width in ((least[0] - 1, least[1]), (least[0], least[1] - 1)):
        assert too_small(metric, height, width) is not None
        assert math.isnan(calculate_metric({"img": image[:height, :width], "img2": other[:height, :width]}, metric))


def test_what_needs_ground_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(img: Any, img2: Any) -> float: ...
    def perhaps(img: Any, img2: Any = None) -> float: ...

    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "own", own)
    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "perhaps", perhaps)
    names = ("calculate_psnr", "calculate_ssim", "calculate_niqe", "own", "perhaps", "unknown")
    assert [name for name in names if needs_ground_truth({"type": name})] == [
        "calculate_psnr", "calculate_ssim", "own"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"img": noise(8, 8)}, "calculate_psnr compares with ground truth, and x of Set has none"),
        ({"img": noise(8, 8), "img2": noise(8, 9)}, "x of Set has 8 x 8 pixels and its ground truth 9 x 8"),
    ],
)
def test_mistakes(images: Any, message: str) -> None:
    image_measured.set("x of Set")
    with pytest.raises(UserError, match=message):
        measure(calculate_metric, images, {"type": "calculate_psnr", "crop_border": 0})


# --- runs -------------------------------------------------------------------------------------------------------------


def write_set(folder: Path, image: np.ndarray[Any, Any]) -> Options:
    """A validation set of one image and its half."""
    for name, content in (("gt", image), ("lq", image[::2, ::2])):
        (folder / name).mkdir(parents=True)
        cv2.imwrite(str(folder / name / "a.png"), content)
    return {
        "name": "One", "type": "PairedImageDataset", "dataroot_gt": str(folder / "gt"),
        "dataroot_lq": str(folder / "lq"), "io_backend": {"type": "disk"},
    }  # fmt: skip


@pytest.fixture
def flat_weights(tmp_path: Path) -> str:
    """Of a network that only repeats pixels, so that a flat image stays flat."""
    torch.manual_seed(0)
    net = esc_arch.ESC(**{key: value for key, value in NETWORK.items() if key != "type"})
    torch.nn.init.zeros_(net.to_img.weight)
    torch.nn.init.zeros_(net.to_img.bias)
    torch.save({"params": net.state_dict()}, tmp_path / "flat.pth")
    return str(tmp_path / "flat.pth")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("verb", ["train", "test"])
def test_niqe_of_flat_images(
    model: str, verb: str, flat_weights: str, run_basicsr: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    opt = request.getfixturevalue(f"{verb}_options") | {"model_type": model}
    opt["datasets"] = {"train": opt["datasets"]["train"]} if verb == "train" else {}
    opt["datasets"]["val"] = write_set(tmp_path / "set", np.full((96, 192, 3), 60, np.uint8))
    opt["path"]["pretrain_network_g"] = flat_weights
    opt["val"] |= {"metrics": {"niqe": NIQE}}
    if verb == "train":
        opt["train"]["optim_g"]["lr"] = 1e-12
    run = run_basicsr(verb, opt)
    assert run.status == 0 and "Traceback" not in run.err, run.err
    log = run.log(of="experiments" if verb == "train" else "results")
    assert "a of One has no calculate_niqe (192 x 96 pixels): the image is flat" in log
    assert "# niqe: nan" in log


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("verb", ["train", "test"])
@pytest.mark.parametrize("gt", [True, False])
def test_small_images_are_found_before_a_run(
    model: str, verb: str, gt: bool, run_basicsr: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    opt = request.getfixturevalue(f"{verb}_options") | {"model_type": model}
    data = write_set(tmp_path / "set", noise(96, 190))
    if not gt:
        del data["dataroot_gt"]
        data["type"] = "SingleImageDataset"
    opt["datasets"] = {"train": opt["datasets"]["train"]} if verb == "train" else {}
    opt["datasets"]["val"] = data
    opt["val"] |= {"metrics": {"niqe": NIQE}}
    run = run_basicsr(verb, copy.deepcopy(opt))
    assert run.status == main(["check", "-opt", "trial.yml"]) == 2
    assert "its result will have 190x96 pixels; for val:metrics:niqe, NIQE needs two blocks of 96 x 96" in run.err
    assert not (run.folder / "experiments").exists() and not (run.folder / "results").exists()


@pytest.mark.parametrize("model", [*MODELS, "ESCRealMSEModel"])
@pytest.mark.parametrize("verb", ["train", "test"])
def test_metrics_of_images_without_ground_truth(
    model: str, verb: str, run_basicsr: Any, photographs: Any, request: pytest.FixtureRequest
) -> None:
    opt = request.getfixturevalue(f"{verb}_options") | {"model_type": model}
    without = {"name": "LQ", "type": "SingleImageDataset", "dataroot_lq": str(photographs.val_lq)}
    opt["datasets"] |= {f"{'val' if verb == 'train' else 'test'}_2": without}
    message = "val:metrics:{0}: calculate_{0} compares with ground truth, and datasets:{1}_2 has none"
    run = run_basicsr(verb, opt)
    assert run.status == main(["check", "-opt", "trial.yml"]) == 2
    for metric in ("psnr", "ssim"):
        assert message.format(metric, "val" if verb == "train" else "test") in run.err
    if verb == "test" and model != "ESCRealMSEModel":
        assert main(["benchmark", "quality", "-opt", "trial.yml"]) == 2
        opt["val"]["metrics"] = {"own": {"type": "calculate_own"}}
        METRIC_REGISTRY._obj_map["calculate_own"] = lambda img, **_: 1.0
        try:
            assert run_basicsr(verb, opt).status == 0
        finally:
            del METRIC_REGISTRY._obj_map["calculate_own"]


class LQDataset(torch.utils.data.Dataset[Any]):
    """Of another package: nothing tells beforehand that it has no ground truth."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return {"lq": torch.rand(3, 8, 8), "lq_path": "b.png"}


@pytest.mark.parametrize("model", MODELS)
def test_a_data_set_of_another_package_without_ground_truth(
    model: str, run_basicsr: Any, test_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "LQDataset", LQDataset)
    test_options |= {"model_type": model, "datasets": {"test": {"name": "Own", "type": "LQDataset"}}}
    run = run_basicsr("test", test_options)
    assert run.status == 2 and "Traceback" not in run.err
    assert "val: metrics: calculate_psnr compares with ground truth, and b of Own has none" in run.err


def test_metrics_of_tensors(run_basicsr: Callable[..., Any], test_options: Options) -> None:
    test_options["val"]["metrics"]["psnr"] = {"type": "calculate_psnr_pt", "crop_border": 2}
    run = run_basicsr("test", test_options)
    assert run.status == 2
    assert "psnr:type: calculate_psnr_pt takes tensors, and validation has images. Give calculate_psnr" in run.err
