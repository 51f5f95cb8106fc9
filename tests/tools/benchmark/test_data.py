"""`basicsr benchmark data`: sets made of photographs, right ones and with each of the common mistakes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
import yaml
from basicsr.utils.matlab_functions import imresize
from PIL import Image as Pillow

from esc_arch.cli import main
from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import Image, encode_png, folder_sources, read_image
from esc_arch.tools.benchmark.data import KNOWN_SETS, PairedFolders, check_folders
from esc_arch.tools.benchmark.resampling import MATLAB, recognise_resampling

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def photograph(height: int, width: int, number: int = 0) -> Image:
    """A part of a photograph, BGR."""
    image = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee)[number % 3]()[:, :, ::-1]
    top, left = 20 + 10 * number, 60 + 20 * number
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def matlab(image: Image, scale: int) -> Image:
    return (imresize(image.astype(np.float32) / 255, 1 / scale).clip(0, 1) * 255).round().astype(np.uint8)


def by_torch(image: Image, scale: int, **options: Any) -> Image:
    size = [length // scale for length in image.shape[:2]]
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return F.interpolate(tensor, size, **options)[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def by_opencv(image: Image, scale: int, interpolation: int) -> Image:
    height, width = (length // scale for length in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=interpolation)


def by_pillow(image: Image, scale: int, filter_: Pillow.Resampling) -> Image:
    height, width = (length // scale for length in image.shape[:2])
    return np.asarray(Pillow.fromarray(image).resize((width, height), filter_))


def jpeg(image: Image, quality: int) -> Image:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)


# --- what LR was made with ----------------------------------------------------------------------------------------

WAYS: dict[str, tuple[Callable[[Image, int], Image], str]] = {
    "opencv cubic": (lambda x, s: by_opencv(x, s, cv2.INTER_CUBIC), "OpenCV's INTER_CUBIC"),
    "opencv area": (lambda x, s: by_opencv(x, s, cv2.INTER_AREA), "OpenCV's INTER_AREA"),
    "opencv lanczos": (lambda x, s: by_opencv(x, s, cv2.INTER_LANCZOS4), "OpenCV's INTER_"),
    "nearest": (lambda x, s: by_opencv(x, s, cv2.INTER_NEAREST), "INTER_NEAREST|single pixels"),
    "pillow bicubic": (lambda x, s: by_pillow(x, s, Pillow.Resampling.BICUBIC), "Pillow's bicubic"),
    "pillow bilinear": (lambda x, s: by_pillow(x, s, Pillow.Resampling.BILINEAR), "Pillow's bilinear"),
    "pillow lanczos": (lambda x, s: by_pillow(x, s, Pillow.Resampling.LANCZOS), "Pillow's Lanczos"),
    "torch bicubic": (lambda x, s: by_torch(x, s, mode="bicubic"), "bicubic without antialias|OpenCV's INTER_CUBIC"),
    "torch antialias": (
        lambda x, s: by_torch(x, s, mode="bicubic", antialias=True),
        "PyTorch's bicubic with antialias",
    ),
    "jpeg": (lambda x, s: jpeg(matlab(x, s), 75), "none of the known ways"),
    "shifted": (lambda x, s: matlab(np.roll(x, -1, axis=0), s), "none of the known ways"),
    "blurred": (lambda x, s: cv2.GaussianBlur(matlab(x, s), (0, 0), 2.5), "none of the known ways"),
}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("number", range(3))
def test_matlab_s_bicubic_is_recognised(scale: int, number: int) -> None:
    hr = photograph(48 * scale, 40 * scale, number)
    assert recognise_resampling(hr, matlab(hr, scale), scale) == MATLAB


def bicubic_weights(length: int, scale: int) -> np.ndarray[Any, Any]:
    """(length / scale, length): Keys' kernel, as wide as `scale` makes it, borders mirrored; written out plainly."""
    weights = np.zeros((length // scale, length))
    for row in range(length // scale):
        centre = (row + 0.5) * scale - 0.5
        for pixel in range(-3 * scale, length + 3 * scale):
            x = abs(pixel - centre) / scale
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            mirrored = -1 - pixel if pixel < 0 else 2 * length - 1 - pixel if pixel >= length else pixel
            weights[row, mirrored] += near if x <= 1 else far if x <= 2 else 0
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_matlab_s_rounding_between_rows_and_columns_is_no_mistake(scale: int) -> None:
    """MATLAB rounds there with images of whole numbers, which published LR images were made of."""
    hr = photograph(48 * scale, 40 * scale)
    down, across = (bicubic_weights(length, scale) for length in hr.shape[:2])
    rows = np.einsum("oh,hwc->owc", down, hr).clip(0, 255).round()
    lr = np.einsum("ow,hwc->hoc", across, rows).clip(0, 255).round().astype(np.uint8)
    assert (lr != matlab(hr, scale)).mean() > 0.01
    assert recognise_resampling(hr, lr, scale) == MATLAB


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_are_named(way: str, scale: int) -> None:
    hr = photograph(60 * scale, 50 * scale)
    make, name = WAYS[way]
    found = recognise_resampling(hr, make(hr, scale), scale)
    assert found != MATLAB
    assert any(part in found for part in name.split("|")), found


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def root(work_folder: Path) -> Path:
    """`datasets/benchmark/Set5`, right in everything, of sizes that few scales divide."""
    source = work_folder / "source"
    source.mkdir()
    for number, name in enumerate(SET5):
        (source / f"{name}.png").write_bytes(encode_png(photograph(77 + number, 83, number)))
    prepare_benchmark(folder_sources(source), work_folder / "datasets/benchmark/Set5", per_scale=True)
    return work_folder / "datasets/benchmark"


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["benchmark", "data", *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[int, dict[str, Any]]:
    """By scale."""
    _, out = check(capsys, "--format", "json", *arguments)
    return {record["scale"]: record for record in json.loads(out)}


def test_a_right_set(root: Path, capsys: Any) -> None:
    status, out = check(capsys, "--sets", "Set5")
    assert status == 0, out
    for record in findings(capsys, "--sets", "Set5").values():
        assert (record["state"], record["images"], record["expected"]) == ("ok", 5, 5)
        assert record["resampling"] == MATLAB and record["problems"] == record["notes"] == ""
    assert "fix" not in out.lower()


def test_wrong_lr_is_named_and_can_be_fixed(root: Path, capsys: Any) -> None:
    for name in SET5[:4]:
        hr = read_image(root / "Set5/HR" / f"{name}.png")
        lr = by_opencv(hr[: len(hr) // 3 * 3, : 83 // 3 * 3], 3, cv2.INTER_CUBIC)
        (root / f"Set5/LR_bicubic/X3/{name}x3.png").write_bytes(encode_png(np.ascontiguousarray(lr)))
    status, out = check(capsys, "--sets", "Set5")
    flat = " ".join(out.split())
    assert status == 1
    assert (
        "Set5 x3: 4 of 5 LR images compared were not made by MATLAB's bicubic, but by OpenCV's INTER_CUBIC: "
        "babyx3.png, birdx3.png, butterflyx3.png and 1 more."
    ) in flat
    assert {scale: record["state"] for scale, record in findings(capsys, "--sets", "Set5").items()} == {
        2: "ok", 3: "problem", 4: "ok"
    }  # fmt: skip
    (line,) = [line for line in out.splitlines() if line.startswith("To fix Set5")]
    prepare, _, then = line.partition(": ")[2].partition(", ")
    assert prepare == "basicsr prepare benchmark -i datasets/benchmark/Set5/HR -o datasets/benchmark/Set5_new"
    folders = "datasets/benchmark/Set5/HR and datasets/benchmark/Set5/LR_bicubic"
    assert then == f"then use its folders in place of {folders}."
    assert main(shlex.split(prepare)[1:]) == 0
    shutil.rmtree(root / "Set5")
    (root / "Set5_new").rename(root / "Set5")
    assert check(capsys, "--sets", "Set5")[0] == 0


def test_sets_that_are_missing(work_folder: Path, capsys: Any) -> None:
    status, out = check(capsys, "--scales", "4")
    assert status == 1
    flat = " ".join(out.split())
    for name in ("Set5", "Set14", "B100", "Urban100", "Manga109"):
        assert f"{name} x4: There are no HR images in datasets/benchmark/{name}/HR. It is the set of " in flat
        prepare = "basicsr prepare benchmark -i FOLDER_OF_ALL_HR_IMAGES -o"
        assert f"To fix {name}: {prepare} datasets/benchmark/{name}\n" in out
        assert KNOWN_SETS[name].source in flat


def test_hr_images_alone_can_be_prepared(root: Path, capsys: Any) -> None:
    shutil.rmtree(root / "Set5")
    (root / "Set5").mkdir()
    for path in (root.parents[1] / "source").iterdir():
        shutil.copy(path, root / "Set5")
    status, out = check(capsys, "--sets", "Set5")
    (line,) = [line for line in out.splitlines() if line.startswith("To fix Set5")]
    assert status == 1
    assert main(shlex.split(line.partition(": ")[2])[1:]) == 0
    assert check(capsys, "--sets", "Set5")[0] == 0


def test_images_that_are_missing_or_strange(root: Path, capsys: Any) -> None:
    (root / "Set5/HR/head.png").unlink()
    (root / "Set5/LR_bicubic/X2/birdx2.png").rename(root / "Set5/LR_bicubic/X2/birdx4.png")
    assert (
        "To fix Set5: basicsr prepare benchmark -i FOLDER_OF_ALL_HR_IMAGES -o datasets/benchmark/Set5_new, then use"
    ) in check(capsys, "--sets", "Set5")[1]
    found = findings(capsys, "--sets", "Set5")
    assert "It has 4 HR images instead of 5. It is the set of Bevilacqua et al." in found[4]["problems"]
    assert "LR images are missing: birdx2.png." in found[2]["problems"]
    assert "LR images belong to no HR image: birdx4.png, headx2.png." in found[2]["problems"]
    assert found[2]["images"] == 3


def test_names_that_are_not_the_set_s(root: Path, capsys: Any) -> None:
    for path in [*(root / "Set5").rglob("head*.png")]:
        path.rename(path.with_name(path.name.replace("head", "tail")))
    found = findings(capsys, "--sets", "Set5")[2]
    assert found["state"] == "ok"
    assert found["notes"] == ("tail.png: not a name of the set, whose files are baby, bird, butterfly, head, woman.")


def test_wrong_sizes(root: Path, capsys: Any) -> None:
    lr = root / "Set5/LR_bicubic/X4/womanx4.png"
    lr.write_bytes(encode_png(read_image(lr)[:, :-1]))
    problem = findings(capsys, "--sets", "Set5")[4]["problems"]
    assert problem == (
        "1 of 5 LR images have the wrong size: womanx4.png is 19 x 20, but woman.png is 83 x 81, which makes 20 x 20 "
        "at x4."
    )


def test_hr_cropped_for_all_scales_at_once_is_good_but_noted(root: Path, capsys: Any) -> None:
    shutil.rmtree(root / "Set5")
    prepare_benchmark(folder_sources(root.parents[1] / "source"), root / "Set5")
    for record in findings(capsys, "--sets", "Set5").values():
        assert record["state"] == "ok"
        assert "All HR images are cropped to multiples of 12" in record["notes"]
    # LR of cropped HR with whole HR: BasicSR's data set crops HR to what belongs to it
    for path in (root.parents[1] / "source").iterdir():
        shutil.copy(path, root / "Set5/HR")
    for record in findings(capsys, "--sets", "Set5").values():
        assert (record["state"], record["resampling"], record["notes"]) == ("ok", MATLAB, "")


def test_data_of_an_option_file(root: Path, work_folder: Path, capsys: Any) -> None:
    section = {
        "name": "Set5",
        "type": "PairedImageDataset",
        "dataroot_gt": "datasets/benchmark/Set5/HR",
        "dataroot_lq": "datasets/benchmark/Set5/LR_bicubic/X3",
        "filename_tmpl": "{}x3",
    }
    single = {"type": "SingleImageDataset", "dataroot_lq": "elsewhere"}
    options = {"scale": 3, "datasets": {"test_1": section, "test_2": single}}
    Path("test.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert check(capsys, "-opt", "test.yml", "test.yml")[0] == 0
    assert list(findings(capsys, "-opt", "test.yml", "test.yml")) == [3]
    shutil.rmtree(root / "Set5/LR_bicubic/X3")
    status, out = check(capsys, "-opt", "test.yml")
    assert status == 1
    assert "There are no LR images in datasets/benchmark/Set5/LR_bicubic/X3." in out
    fix = "To fix Set5: basicsr prepare benchmark -i datasets/benchmark/Set5/HR -o datasets/benchmark/Set5_new, then"
    assert fix in out


def test_some_of_many_images_are_compared_with_hr(root: Path) -> None:
    folders = PairedFolders("Set5", 2, root / "Set5/HR", root / "Set5/LR_bicubic/X2", "{}x2")
    report = check_folders(folders, most=2)
    assert report.problems == [] and report.notes == ["One in 3 of its LR images was compared with HR."]


def test_the_report_is_written_to_a_file(root: Path, capsys: Any) -> None:
    for form, start in (("text", "data set"), ("markdown", "| data set"), ("csv", "dataset,"), ("json", "[")):
        assert check(capsys, "--sets", "Set5", "--format", form, "-o", "report")[0] == 0
        assert Path("report").read_text(encoding="utf-8").startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "1"], "--scales 1: benchmark data have scales from 2 on."),
        (["-opt", "no.yml"], "option file no.yml does not exist"),
        (["-opt", "empty.yml"], "empty.yml: no data set of type PairedImageDataset in folders"),
        (["-opt", "half.yml"], "half.yml: datasets:test_1 needs dataroot_gt, dataroot_lq and an integer scale."),
        (["-o", "no/report"], "Cannot write no/report"),
    ],
)
def test_bad_input(arguments: list[str], message: str, work_folder: Path, capsys: Any) -> None:
    Path("empty.yml").write_text("datasets: {test_1: {type: SingleImageDataset}}", encoding="utf-8")
    Path("half.yml").write_text("datasets: {test_1: {type: PairedImageDataset, dataroot_gt: x}}", encoding="utf-8")
    status, out = check(capsys, *arguments)
    assert status == 2
    assert message in out
    assert sorted(path.name for path in work_folder.iterdir()) == ["empty.yml", "half.yml"]


def test_a_damaged_image(root: Path, capsys: Any) -> None:
    (root / "Set5/HR/bird.png").write_bytes(b"no image")
    status, out = check(capsys, "--sets", "Set5")
    assert status == 2
    assert re.search(r"bird\.png .*\. Replace it or take it out of the data set\.", out)
