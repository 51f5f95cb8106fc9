"""PSNR and SSIM against scikit-image, which knows nothing of BasicSR, on the same luma.

That sharing images among processes changes no digit is tested in tests/cli/test_two_processes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from basicsr.metrics import calculate_metric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from esc_arch.cli import main
from esc_arch.data.image_files import encode_png

Image = np.ndarray[Any, Any]

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def noisy(image: Image) -> Image:
    noise = np.random.default_rng(0).normal(0, 8, image.shape)
    return (image + noise).clip(0, 255).round().astype(np.uint8)


def through_jpeg(image: Image) -> Image:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 1)


def enlarged_again(image: Image) -> Image:
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def off_by_one(image: Image) -> Image:
    """Almost the same: PSNR near 48 dB, where rounding of the luma would be seen."""
    return np.where(image < 255, image + 1, 254).astype(np.uint8)


DISTORTIONS: list[Callable[[Image], Image]] = [noisy, through_jpeg, enlarged_again, off_by_one]


def luma(image: Image, border: int) -> Image:
    """Y of BT.601 in 16 .. 235, float64, of (H, W, 3) uint8 BGR without `border` pixels on each side."""
    blue, green, red = np.moveaxis(image.astype(np.float64), -1, 0)
    y = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    return y[border : y.shape[0] - border, border : y.shape[1] - border]


def by_scikit_image(image: Image, truth: Image, border: int) -> dict[str, float]:
    pair = luma(truth, border), luma(image, border)
    return {
        "psnr": float(peak_signal_noise_ratio(*pair, data_range=255)),
        "ssim": float(
            structural_similarity(*pair, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        ),
    }


def photograph(name: str) -> Image:
    return np.ascontiguousarray(getattr(skimage.data, name)()[100:231, 80:233, ::-1])


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("distortion", DISTORTIONS, ids=lambda distortion: distortion.__name__)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_metrics_are_those_of_scikit_image(name: str, distortion: Callable[[Image], Image], scale: int) -> None:
    truth = photograph(name)
    image = distortion(truth)
    expected = by_scikit_image(image, truth, scale)
    for metric, value in expected.items():
        options = {"type": f"calculate_{metric}", "crop_border": scale, "test_y_channel": True}
        found = calculate_metric({"img": image, "img2": truth}, options)
        assert math.isfinite(value)
        assert found == pytest.approx(value, abs=5e-6), metric  # so that the 4th decimal is the same


def test_the_border_and_the_luma_matter() -> None:
    """Or the test above could not fail."""
    truth = photograph("astronaut")
    image = noisy(truth)
    image[:2] = 0
    psnr = {border: by_scikit_image(image, truth, border)["psnr"] for border in (2, 4, 1)}
    assert psnr[1] < psnr[2] - 1 and abs(psnr[2] - psnr[4]) > 1e-4
    rgb = peak_signal_noise_ratio(truth[2:-2, 2:-2], image[2:-2, 2:-2])
    assert abs(rgb - psnr[2]) > 0.5


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_whole_test_gives_what_scikit_image_gives_for_its_pictures(
    scale: int, run_basicsr: Any, test_options: Any, tmp_path: Path
) -> None:
    """From LR in files by ESCModel to the mean in the log: HR is larger than what belongs to LR, and is cropped."""
    source = tmp_path / "source"
    source.mkdir()
    for name in PHOTOGRAPHS[:2]:
        (source / f"{name}.png").write_bytes(encode_png(photograph(name)))  # 131 x 153
    assert main(["prepare", "benchmark", "-i", str(source), "-o", str(tmp_path / "set"), "--scales", str(scale)]) == 0
    test_options["scale"] = test_options["network_g"]["upscaling_factor"] = scale
    test_options["datasets"]["test_1"] |= {
        "dataroot_gt": str(tmp_path / "set/HR"),
        "dataroot_lq": str(tmp_path / f"set/LR_bicubic/X{scale}"),
        "filename_tmpl": f"{{}}x{scale}",
    }
    for metric in test_options["val"]["metrics"].values():
        metric["crop_border"] = scale
    torch.manual_seed(0)
    run = run_basicsr("test", test_options)
    assert run.status == 0, run.err
    found = []
    for name in PHOTOGRAPHS[:2]:
        result = cv2.imread(str(run.folder / f"results/trial/visualization/Cuts/{name}x{scale}_trial.png"))
        assert result.shape == (131 // scale * scale, 153 // scale * scale, 3)
        found.append(by_scikit_image(result, photograph(name)[: result.shape[0], : result.shape[1]], scale))
    for metric in ("psnr", "ssim"):
        mean = sum(each[metric] for each in found) / len(found)
        assert f"# {metric}: {mean:.4f}" in run.log(of="results")
