"""ESCModel: the evaluation of the paper, and pictures that compare its result with bicubic enlargement."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.registry import MODEL_REGISTRY
from skimage.metrics import peak_signal_noise_ratio

from esc_arch import ESC, ESCModel
from esc_arch.models import comparison
from esc_arch.models.comparison import CAPTION, PANEL, side_by_side, write_comparison
from esc_arch.models.esc_model import self_ensemble

WINDOW = 4
SIZES = [(8, 12), (9, 12), (8, 10), (7, 5), (3, 2), (1, 6), (1, 1)]


def randomise(net: torch.nn.Module, seed: int) -> None:
    """An untrained network hides mistakes: parts of it are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture
def model(make_model: Any) -> ESCModel:
    """One whose averaged network differs from the raw one."""
    made = make_model()
    randomise(made.net_g, 0)
    randomise(made.net_g_ema, 1)
    return made


def image_of(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def padded(image: torch.Tensor) -> torch.Tensor:
    """At the bottom and the right to the next multiple of the window, by numpy."""
    bottom, right = (-size % WINDOW for size in image.shape[-2:])
    return torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="reflect"))


@pytest.mark.parametrize("name", ["ESCModel", "ESRModel"])
def test_it_is_registered_under_both_names(name: str, make_model: Any) -> None:
    assert MODEL_REGISTRY.get(name) is ESCModel
    assert type(make_model(model_type=name)) is ESCModel


@pytest.mark.parametrize("size", SIZES)
def test_the_image_is_padded_by_reflection_and_the_output_cropped(size: tuple[int, int], model: ESCModel) -> None:
    image = image_of(size)
    model.feed_data({"lq": image})
    model.test()
    with torch.no_grad():
        expected = model.net_g_ema(padded(image))[..., : 2 * size[0], : 2 * size[1]]
    assert model.output.shape == (1, 3, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(model.output, expected, rtol=0, atol=1e-6)
    assert model.lq is image or torch.equal(model.lq, image)


@pytest.mark.parametrize("size", SIZES)
def test_srmodel_differs_only_where_there_is_something_to_pad(
    size: tuple[int, int], model: ESCModel, make_model: Any
) -> None:
    plain = make_model(model_type="SRModel")
    assert type(plain) is SRModel
    plain.net_g_ema.load_state_dict(model.net_g_ema.state_dict())
    for either in (model, plain):
        either.feed_data({"lq": image_of(size)})
        either.test()
    if all(side % WINDOW == 0 for side in size):
        assert torch.equal(model.output, plain.output)
    elif min(size) > 1:  # a single pixel's neighbours are itself, with or without padding
        assert (model.output - plain.output).abs().max() > 1e-4


def test_without_an_average_the_network_itself_is_used(make_model: Any, train_options: Any) -> None:
    del train_options["train"]["ema_decay"]
    model = make_model(train=train_options["train"])
    randomise(model.net_g, 0)
    image = image_of((5, 6))
    model.feed_data({"lq": image})
    model.test()
    with torch.no_grad():
        expected = model.net_g(padded(image))[..., :10, :12]
    torch.testing.assert_close(model.output, expected, rtol=0, atol=1e-6)
    assert model.net_g.training


def test_a_network_without_a_window_is_not_padded(make_model: Any) -> None:
    network = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}
    model = make_model(network_g=network)
    image = image_of((5, 6))
    model.feed_data({"lq": image})
    model.test()
    with torch.no_grad():
        assert torch.equal(model.output, model.net_g_ema(image))


def test_results_are_computed_without_tf32(model: ESCModel) -> None:
    """On GPUs, where it would change the last digits; training's choice comes back."""

    def switches(*_: Any) -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = switches()
    seen: list[tuple[str, bool]] = []
    model.net_g_ema.register_forward_pre_hook(lambda *_: seen.append(switches()))
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        model.feed_data({"lq": image_of((5, 6))})
        model.test()
        assert seen == [("highest", False)]
        assert switches() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_window_may_be_left_to_the_network(make_model: Any, train_options: Any) -> None:
    del train_options["network_g"]["window_size"]  # ESC's own is 32
    model = make_model(network_g=train_options["network_g"])
    assert model.window_size == ESC().window_size == 32


def test_the_last_training_batch_is_no_ground_truth(model: ESCModel) -> None:
    model.feed_data({"lq": torch.rand(2, 3, 4, 4), "gt": torch.rand(2, 3, 8, 8)})
    model.optimize_parameters(1)
    model.feed_data({"lq": image_of((5, 6)), "lq_path": ["a.png"]})
    model.test()
    assert "gt" not in model.get_current_visuals()


# --- comparison ---------------------------------------------------------------------------------------------------


def y_of(picture: np.ndarray[Any, Any]) -> Any:
    """The luma (BT.601) of a BGR picture without a border of 2 pixels, in float64."""
    blue, green, red = np.moveaxis(picture.astype(np.float64), -1, 0)
    return (16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255)[2:-2, 2:-2]


def psnr(image: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    return float(peak_signal_noise_ratio(y_of(truth), y_of(image), data_range=255))


def bicubic_of(path: Path) -> np.ndarray[Any, Any]:
    image = imresize(cv2.imread(str(path)).astype(np.float32) / 255, 2)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


FIGURES = re.compile(r"^  (\S+) +bicubic +(\S+) dB  ESC +(\S+) dB  (\S+) dB$", re.MULTILINE)


def figures(log: str) -> dict[str, list[float]]:
    """From the last comparison in a log: bicubic, network and gain of each image and of their mean."""
    found = FIGURES.findall(log[log.rindex("PSNR (Y) on ") :])
    return {name: [float(value) for value in values] for name, *values in found}


@pytest.mark.parametrize("verb", ["train", "test"])
def test_the_comparison_shows_and_measures_each_image(
    verb: str, run_basicsr: Any, train_options: Any, test_options: Any, photographs: Any
) -> None:
    options = train_options if verb == "train" else test_options
    options["val"] |= {"comparison": True, "save_img": True}
    run = run_basicsr(verb, options)
    assert run.status == 0, run.err
    root = run.folder / ("experiments" if verb == "train" else "results") / "trial"
    log = run.log(of=root.parent.name)
    assert log.count("PSNR (Y) on Cuts, pictures in ") == (2 if verb == "train" else 1)
    logged = figures(log)
    if verb == "train":
        lines = (root / "metrics.jsonl").read_text().splitlines()
        found = [record["bicubic"] for record in map(json.loads, lines) if "dataset" in record]
        assert found[0] == found[1] and found[0].keys() == {"psnr", "ssim"}
        assert found[0]["psnr"] == pytest.approx(logged["mean"][0], abs=0.011)
        assert f"{found[0]['psnr']:.4f}" in (root / "summary.md").read_text()
    assert list(logged) == ["val0x2", "val1x2", "mean"]
    assert [path.name for path in sorted((root / "visualization/comparison/Cuts").iterdir())] == [
        "val0x2.png", "val1x2.png"
    ]  # fmt: skip
    for number in (0, 1):
        name = f"val{number}x2"
        truth = cv2.imread(str(photographs.val_gt / f"val{number}.png"))
        saved = f"{name}/{name}_4.png" if verb == "train" else f"Cuts/{name}_trial.png"
        result = cv2.imread(str(root / "visualization" / saved))
        bicubic = bicubic_of(photographs.val_lq / f"{name}.png")
        expected = [psnr(bicubic, truth), psnr(result, truth)]
        assert logged[name] == pytest.approx([*expected, expected[1] - expected[0]], abs=0.011)

        picture = cv2.imread(str(root / "visualization/comparison/Cuts" / f"{name}.png"))
        height, width = truth.shape[:2]
        gap = (picture.shape[1] - 3 * width) // 2
        assert picture.shape[1] == 3 * width + 2 * gap
        assert gap < 10
        for place, panel in enumerate((bicubic, result, truth)):
            left = place * (width + gap)
            shown = picture[CAPTION : CAPTION + height, left : left + width]
            # Two computations of bicubic differ by 1e-7, which at a tie is one grey level
            levels = np.abs(shown.astype(int) - panel) if panel is bicubic else (shown != panel).astype(int) * 255
            assert levels.max() <= 1 and levels.mean() < 0.01
    assert logged["mean"] == pytest.approx(
        [sum(logged[f"val{number}x2"][column] for number in (0, 1)) / 2 for column in range(3)], abs=0.011
    )


def test_nothing_is_compared_unless_asked(run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("train", train_options)
    assert "PSNR (Y)" not in run.log()
    assert not (run.experiment() / "visualization" / "comparison").exists()


def test_images_without_ground_truth_are_left_out(run_basicsr: Any, train_options: Any, photographs: Any) -> None:
    """Also the first one, which SRModel would measure with the last training batch."""
    train_options["datasets"]["val"] = {
        "name": "Wild", "type": "SingleImageDataset", "dataroot_lq": str(photographs.val_lq),
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    train_options["val"] = {"val_freq": 2, "comparison": True}
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert run.log().count("Comparison on Wild: no image has a ground truth.") == 2
    assert not (run.experiment() / "visualization" / "comparison").exists()


@pytest.mark.parametrize("size", [(PANEL + 40, 100), (100, PANEL + 40), (5, 9), (1, 1)])
def test_pictures_are_of_bounded_size(size: tuple[int, int]) -> None:
    images = {name: np.full((*size, 3), value, np.uint8) for name, value in (("a", 10), ("b", 20), ("c", 30))}
    picture = side_by_side(images)
    height, width = (min(side, PANEL) for side in size)
    assert picture.dtype == np.uint8
    assert 3 * width <= picture.shape[1] <= 3 * width + 20
    assert CAPTION + height <= picture.shape[0] <= 2 * height + CAPTION + 20
    assert [picture[CAPTION, x].tolist() for x in (0, picture.shape[1] - 1)] == [[10] * 3, [30] * 3]


def test_what_is_cropped_is_the_middle() -> None:
    image = np.zeros((PANEL + 40, 8, 3), np.uint8)
    image[20 : 20 + PANEL] = 200
    picture = side_by_side({"a": image, "b": image})
    assert (picture[CAPTION : CAPTION + PANEL, :8] == 200).all()


def test_a_comparison_has_the_scale_of_the_network_and_replaces_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    borders = []

    def note(image: Any, gt: Any, crop_border: int, test_y_channel: bool) -> float:
        borders.append((crop_border, test_y_channel, image.shape))
        return 30.0

    monkeypatch.setattr(comparison, "calculate_psnr", note)
    gt, pictures = torch.rand(1, 3, 27, 24), []
    for result in (gt, torch.zeros_like(gt)):
        visuals = {"lq": torch.rand(1, 3, 9, 8), "result": result, "gt": gt}
        assert write_comparison(tmp_path / "a.png", "ESC", visuals) == (30.0, 30.0)
        pictures.append((tmp_path / "a.png").read_bytes())
    assert borders == [(3, True, (27, 24, 3))] * 4
    assert pictures[0] != pictures[1]


# --- protocols ----------------------------------------------------------------------------------------------------


def result_of(make_model: Any, train_options: Any, image: torch.Tensor, **val: Any) -> torch.Tensor:
    model = make_model(val=train_options["val"] | val)
    randomise(model.net_g_ema, 3)
    model.feed_data({"lq": image})
    model.test()
    return model.output


def test_the_protocol_of_srmodel_is_what_srmodel_does(make_model: Any, train_options: Any) -> None:
    image = image_of((5, 6))
    expected = make_model(model_type="SRModel")
    randomise(expected.net_g_ema, 3)
    expected.feed_data({"lq": image})
    expected.test()
    assert torch.equal(result_of(make_model, train_options, image, protocol="srmodel"), expected.output)
    assert not torch.equal(result_of(make_model, train_options, image), expected.output)


def test_the_ensemble_is_the_mean_of_eight_orientations(make_model: Any, train_options: Any) -> None:
    image = image_of((5, 6))
    expected = []
    for turns in range(4):
        for mirrored in (False, True):
            version = torch.rot90(image, turns, (-2, -1))
            result = result_of(make_model, train_options, version.flip(-1) if mirrored else version)
            expected.append(torch.rot90(result.flip(-1) if mirrored else result, -turns, (-2, -1)))
    output = result_of(make_model, train_options, image, protocol="ensemble")
    torch.testing.assert_close(output, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output, expected[0], atol=1e-3)
    # Of an image that is turned, the result is turned: what the ensemble is for
    turned = result_of(make_model, train_options, torch.rot90(image, 1, (-2, -1)), protocol="ensemble")
    torch.testing.assert_close(torch.rot90(turned, -1, (-2, -1)), output, rtol=1e-5, atol=1e-6)


def test_unevenly_enlarged_images_are_not_transposed() -> None:
    seen = []

    def enlarge(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape[-2:]))
        return image.repeat_interleave(3, -1)

    image = image_of((5, 6))
    assert torch.equal(self_ensemble(enlarge, image, transpose=False), image.repeat_interleave(3, -1))
    assert seen == [(5, 6)] * 4


def test_the_metrics_of_each_image_are_kept(run_basicsr: Any, test_options: Any) -> None:
    test_options["val"]["per_image"] = True
    run = run_basicsr("test", test_options)
    assert run.status == 0, run.err
    with open(run.folder / "results/trial/visualization/per_image/Cuts.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["val0x2", "val1x2"]
    for metric in ("psnr", "ssim"):
        mean = sum(float(row[metric]) for row in rows) / 2
        assert f"# {metric}: {mean:.4f}" in run.log(of="results")


def test_a_border_that_leaves_nothing(run_basicsr: Any, test_options: Any) -> None:
    test_options["val"]["metrics"]["psnr"]["crop_border"] = 300
    run = run_basicsr("test", test_options)
    assert run.status == 2
    assert "its result will have 32x48 pixels; for val:metrics:psnr, crop_border 300 leaves nothing" in run.err


@pytest.mark.parametrize(
    ("model", "val", "message"),
    [
        ("ESCModel", {"protocol": "ensembel"}, "'ensembel' given; must be published, srmodel or ensemble"),
        ("SRModel", {"protocol": "ensemble"}, "val:protocol: SRModel does not use it; ESCModel does"),
        ("SRModel", {"per_image": True}, "val:per_image: SRModel does not use it; ESCModel does"),
    ],
)
def test_a_wrong_protocol_is_reported(
    model: str, val: dict[str, Any], message: str, run_basicsr: Any, test_options: Any
) -> None:
    test_options["model_type"] = model
    test_options["val"] |= val
    run = run_basicsr("test", test_options)
    assert run.status == 2 and message in run.err
    assert not (run.folder / "results").exists()
