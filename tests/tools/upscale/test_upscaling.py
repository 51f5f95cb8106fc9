"""Pixels of all kinds through a network, and the Python API, beside the network called on plain tensors."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fresh import run_code
from networks import max_error, small_esc
from PIL import Image
from skimage.data import astronaut, chelsea

import esc_arch
from esc_arch import ESCLTE, UserError
from esc_arch.tools.upscale import Upscaler, upscaling
from esc_arch.tools.upscale.upscaling import Settings, enlarge_many, enlarge_pixels, upscale

PHOTOGRAPH = astronaut()[40:90, 170:231]  # no multiple of the window
CAT = chelsea()[90:140, 120:181]
OPTIONS = {"type": "ESC", "dim": 16, "pdim": 4, "kernel_size": 13, "n_blocks": 1, "conv_blocks": 2, "window_size": 8}
OPTIONS |= {"num_heads": 2, "exp_ratio": 1.25, "upscaling_factor": 2}


def calm(net: torch.nn.Module) -> torch.nn.Module:
    """Parameters that change a picture without driving it out of 0 .. 1."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "x2.pth"
    torch.save({"params": calm(small_esc()).state_dict(), "network_g": OPTIONS}, path)
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> Upscaler:
    return esc_arch.load(weights, device="cpu")


@pytest.fixture(scope="module")
def any_scale(tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    options: dict[str, Any] = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1}
    options |= {"window_size": 4, "num_heads": 2, "hidden_dim": 16, "mlp_dims": (16,)}
    torch.manual_seed(0)
    net = ESCLTE(**options)
    path = tmp_path_factory.mktemp("weights") / "lte.pth"
    torch.save({"params": net.state_dict(), "network_g": {"type": "ESCLTE", **options}}, path)
    return esc_arch.load(path, device="cpu")


def by_network(model: Upscaler, image: np.ndarray, scale: float | None = None) -> np.ndarray:
    """What the network makes of (H, W, 3): (H', W', 3), float32 in 0 .. 1."""
    peak = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
    x = torch.from_numpy(image.astype(np.float32) / np.float32(peak)).permute(2, 0, 1)[None]
    return model(x, scale)[0].clamp(0, 1).permute(1, 2, 0).numpy()


def rounded(image: np.ndarray, dtype: Any) -> np.ndarray:
    return (image * np.float32(np.iinfo(dtype).max)).round().astype(dtype)


def deep(image: np.ndarray) -> np.ndarray:
    return (image * np.uint32(257) - np.arange(image.shape[1])[:, None] % 100).clip(0, 65535).astype(np.uint16)


def cut_out() -> np.ndarray:
    """A cat in an ellipse; around it bright green that nobody is to see."""
    rows, columns = np.mgrid[-1:1:50j, -1:1:61j]
    alpha = ((rows**2 + columns**2 < 0.8) * 255).astype(np.uint8)
    return np.dstack([np.where(alpha[..., None] > 0, CAT, np.array([0, 255, 0], np.uint8)), alpha])


@pytest.mark.parametrize("kind", [np.asarray, deep], ids=["8", "16"])
def test_colours_are_what_the_network_makes(model: Upscaler, kind: Any) -> None:
    image = kind(PHOTOGRAPH)
    enlarged = upscale(image, model)
    assert enlarged.dtype == image.dtype
    assert enlarged.shape == (100, 122, 3)
    np.testing.assert_array_equal(enlarged, rounded(by_network(model, image), image.dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_types(model: Upscaler, dtype: Any) -> None:
    image = (PHOTOGRAPH / 255).astype(dtype)
    enlarged = upscale(image, model)
    assert enlarged.dtype == dtype
    assert np.abs(enlarged.astype(np.float32) - by_network(model, image.astype(np.float32))).max() < 1e-3
    assert enlarged.min() >= 0 and enlarged.max() <= 1


@pytest.mark.parametrize("shape", [(50, 61), (50, 61, 1)])
def test_grey_is_the_mean_of_three_equal_channels(model: Upscaler, shape: tuple[int, ...]) -> None:
    image = PHOTOGRAPH[..., 1].reshape(shape)
    enlarged = upscale(image, model)
    assert enlarged.shape == (100, 122, *shape[2:])
    expected = by_network_unclipped(model, np.stack([PHOTOGRAPH[..., 1]] * 3, axis=2)).mean(axis=0).clip(0, 1)
    assert np.abs(enlarged.reshape(100, 122) - expected * 255).max() < 0.51


def test_alpha_goes_through_the_network_too(model: Upscaler) -> None:
    image = cut_out()
    enlarged = upscale(image, model)
    alpha = by_network_unclipped(model, np.stack([image[..., 3]] * 3, axis=2)).mean(axis=0).clip(0, 1)
    assert np.abs(enlarged[..., 3] - alpha * 255).max() < 0.51


def test_hidden_colours_leave_no_fringe(model: Upscaler) -> None:
    image = cut_out()
    other = image.copy()
    other[image[..., 3] == 0, :3] = (255, 0, 255)
    np.testing.assert_array_equal(upscale(image, model), upscale(other, model))
    seen = (image[..., 3] > 0).astype(np.uint8)
    edge = (seen - cv2.erode(seen, np.ones((7, 7)))).repeat(2, axis=0).repeat(2, axis=1).astype(bool)
    whole = upscale(CAT, model)[edge].astype(int)
    with_fringe = np.abs(upscale(image[..., :3], model)[edge] - whole).mean()
    assert np.abs(upscale(image, model)[edge][:, :3] - whole).mean() < with_fringe / 2


@pytest.mark.parametrize("level", [0, 128, 255])
def test_alpha_that_is_the_same_everywhere_stays_so(model: Upscaler, level: int) -> None:
    image = np.dstack([PHOTOGRAPH, np.full(PHOTOGRAPH.shape[:2], level, np.uint8)])
    enlarged = upscale(image, model)
    assert (enlarged[..., 3] == level).all()
    np.testing.assert_array_equal(enlarged[..., :3], upscale(PHOTOGRAPH, model))


def test_bicubic_alpha(model: Upscaler) -> None:
    image = cut_out()
    rows = list(enlarge_pixels(model, image, Settings(alpha="bicubic")))
    plane = Image.fromarray(image[..., 3].astype(np.float32)).resize((122, 100), Image.Resampling.BICUBIC)
    expected = np.asarray(plane).clip(0, 255)
    assert np.abs(np.concatenate(rows)[..., 3] - expected).max() < 0.51


@pytest.mark.parametrize("scale", [1, 1.5, 3, 0.4])
def test_other_scales_are_resized_from_the_networks(model: Upscaler, scale: float) -> None:
    enlarged = upscale(PHOTOGRAPH, model, scale=scale)
    height, width = round(50 * scale), round(61 * scale)
    assert enlarged.shape == (height, width, 3)
    planes = [Image.fromarray(plane) for plane in by_network_unclipped(model, PHOTOGRAPH)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    assert np.abs(enlarged - np.stack(resized, axis=2).clip(0, 1) * 255).max() < 0.51


def by_network_unclipped(model: Upscaler, image: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None])[0].numpy()


@pytest.mark.parametrize("scale", [1, 2.5, 3.1415])
def test_a_network_of_any_scale_is_asked_for_it(any_scale: Upscaler, scale: float) -> None:
    image = PHOTOGRAPH[:14, :17]
    enlarged = upscale(image, any_scale, scale=scale)
    np.testing.assert_array_equal(enlarged, rounded(by_network(any_scale, image, scale), np.uint8))


def test_pixels_added_before_and_cropped_after(model: Upscaler) -> None:
    rows = list(enlarge_pixels(model, PHOTOGRAPH, Settings(pre_pad=5)))
    padded = np.pad(PHOTOGRAPH, ((5, 5), (5, 5), (0, 0)), mode="reflect")
    expected = rounded(by_network(model, padded), np.uint8)[10:110, 10:132]
    np.testing.assert_array_equal(np.concatenate(rows), expected)
    assert (expected != upscale(PHOTOGRAPH, model)).any()
    together = enlarge_many(model, [PHOTOGRAPH, CAT], Settings(pre_pad=5))
    assert np.abs(together[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("settings", [Settings(), Settings(scale=1.5), Settings(pre_pad=3), Settings(scale=3)])
@pytest.mark.parametrize("image", [PHOTOGRAPH, cut_out(), PHOTOGRAPH[..., :2]], ids=["RGB", "RGBA", "grey+alpha"])
def test_parts_make_the_same_as_the_whole(
    model: Upscaler, image: np.ndarray, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of odd heights, whatever makes them, are put together to the same rows."""
    from esc_arch.tools.upscale import large_images

    def in_blocks(upscaler: Upscaler, part: np.ndarray, *, scale: Any = None, **_: Any) -> Iterator[torch.Tensor]:
        x = torch.from_numpy(part.astype(np.float32) / 255).permute(2, 0, 1)[None]
        yield from upscaler(x, scale)[0].split(17, dim=1)

    expected = list(enlarge_pixels(model, image, settings))
    monkeypatch.setattr(large_images, "enlarge", in_blocks)
    rows = list(enlarge_pixels(model, image, settings))
    assert len(rows) > 1
    assert np.abs(np.concatenate(rows).astype(int) - np.concatenate(expected)).max() <= 1


def test_images_together_are_what_they_are_alone(model: Upscaler) -> None:
    images = [PHOTOGRAPH, cut_out(), CAT[..., :1], deep(CAT)]
    for settings in (Settings(), Settings(scale=3), Settings(alpha="bicubic")):
        for image, enlarged in zip(images, enlarge_many(model, images, settings), strict=True):
            alone = list(enlarge_pixels(model, image, settings))
            assert enlarged.dtype == image.dtype
            difference = np.abs(enlarged.astype(int) - np.concatenate(alone)).max()
            assert difference <= (1 if image.dtype == np.uint8 else 3)


def test_images_together_become_the_types_of_their_files(model: Upscaler) -> None:
    first, second = enlarge_many(model, [deep(PHOTOGRAPH), deep(CAT)], Settings(), [np.uint8, np.uint16])
    assert (first.dtype, second.dtype) == (np.uint8, np.uint16)
    assert np.abs(first.astype(int) - upscale(deep(PHOTOGRAPH), model) / 257).max() <= 1


def test_too_many_images_for_memory_run_alone(model: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes = Upscaler.__call__, []

    def call(self: Upscaler, image: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        sizes.append(len(image))
        if len(image) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, image, scale)

    expected = upscale(PHOTOGRAPH, model)
    monkeypatch.setattr(Upscaler, "__call__", call)
    first, second = enlarge_many(model, [PHOTOGRAPH, CAT], Settings())
    assert sizes == [2, 1, 1]
    np.testing.assert_array_equal(first, expected)
    assert second.shape == (100, 122, 3)


def test_other_faults_of_a_batch_are_raised(model: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Upscaler, "__call__", call)
    with pytest.raises(RuntimeError, match="something else"):
        enlarge_many(model, [PHOTOGRAPH, CAT], Settings())


def test_tensors(model: Upscaler) -> None:
    image = torch.from_numpy(PHOTOGRAPH.copy()).permute(2, 0, 1)
    enlarged = upscale(image, model)
    assert enlarged.dtype == torch.uint8
    np.testing.assert_array_equal(enlarged.permute(1, 2, 0).numpy(), upscale(PHOTOGRAPH, model))
    batch = torch.stack([image, image.flip(-1)]).double() / 255
    several = upscale(batch, model)
    assert several.dtype == torch.float64
    assert max_error(several.float(), model(batch).clamp(0, 1)) < 1e-6
    assert upscale(batch.half(), model, scale=1).shape == batch.shape


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_pillow_images(model: Upscaler, mode: str) -> None:
    array = cut_out() if mode == "RGBA" else PHOTOGRAPH
    image = Image.fromarray(deep(array)[..., 0]) if mode == "I;16" else Image.fromarray(array).convert(mode)
    image.info["icc_profile"] = b"a profile"
    enlarged = upscale(image, model)
    assert (enlarged.mode, enlarged.size) == (mode, (122, 100))
    assert enlarged.info["icc_profile"] == b"a profile"
    np.testing.assert_array_equal(np.asarray(enlarged), upscale(np.asarray(image), model))


def test_pillow_palettes_become_colours(model: Upscaler) -> None:
    image = Image.fromarray(PHOTOGRAPH).quantize(32)
    np.testing.assert_array_equal(np.asarray(upscale(image, model)), upscale(np.asarray(image.convert("RGB")), model))


def test_networks_are_kept_by_path(weights: Path, model: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    upscaling._kept.cache_clear()
    monkeypatch.setattr(upscaling, "load", lambda path: loaded.append(path) or model)
    for path in (str(weights), weights):
        np.testing.assert_array_equal(upscale(PHOTOGRAPH, path), upscale(PHOTOGRAPH, model))
    assert loaded == [weights]
    weights.touch()
    upscale(PHOTOGRAPH, weights)
    assert len(loaded) == 2
    upscaling._kept.cache_clear()


def test_memory_as_text(model: Upscaler) -> None:
    image = cut_out()
    np.testing.assert_array_equal(upscale(image, model, max_memory="64G"), upscale(image, model))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[0]], "The image is of type list; allowed: numpy.ndarray, torch.Tensor, PIL.Image"),
        (np.zeros((4, 4, 5), np.uint8), r"The array is \(4, 4, 5\) of uint8; it must be \(H, W\) or \(H, W, C\)"),
        (np.zeros((4, 4, 3), np.int32), r"The array is \(4, 4, 3\) of int32"),
        (np.zeros((0, 4, 3), np.uint8), r"The array is \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"The array is \(4,\) of uint8"),
        (torch.zeros(4, 4), r"The tensor is \(4, 4\) of torch.float32; it must be \(3, H, W\) or \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 4), r"The tensor is \(1, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "of torch.int64"),
        (
            PHOTOGRAPH.astype(np.float32),
            r"The image has values from 0 to 249; floating-point images must be in 0 .. 1: ",
        ),
        (np.full((4, 4), -0.1, np.float16), "The image has values from -0.0999756 to -0.0999756"),
        (np.full((4, 4, 3), np.nan), "The image has values from nan to nan"),
        (torch.full((2, 3, 4, 4), 1.1), r"values from 1.1 to 1.1; .* divide it by its largest possible value, such as"),
        (Image.new("F", (4, 4)), "a kind that is not enlarged .Pillow's mode F.. Save it with 8 or 16 bits"),
    ],
)
def test_images_that_are_none(model: Upscaler, image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        upscale(image, model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_results_that_are_no_numbers(
    weights: Path, precision: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = esc_arch.load(weights, device="cpu", precision=precision)
    original = Upscaler.__call__

    def call(self: Upscaler, image: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        result = original(self, image, scale)
        result[..., 7, 9] = value
        return result

    monkeypatch.setattr(Upscaler, "__call__", call)
    cure = (
        "Its weights are broken: use others" if precision == "fp32" else "Half precision is too narrow .use --fp32, in"
    )
    for image in (PHOTOGRAPH, torch.zeros(2, 3, 8, 8)):
        with pytest.raises(UserError, match=rf"^x2.pth gave values that are not finite .NaN or infinite.\. {cure}"):
            upscale(image, broken)


def test_rounding_is_no_range(model: Upscaler) -> None:
    assert upscale(np.full((4, 4), 1 + 1e-6, np.float32), model).shape == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "The scale is 0; it must be a number above 0."),
        ({"scale": float("nan")}, "The scale is nan"),
        ({"tile": -1}, "tile is -1; it must be a number of pixels, 0 or more."),
        ({"pre_pad": -2}, "pre_pad is -2"),
        ({"alpha": "none"}, "alpha is 'none'; allowed: network, bicubic."),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**options)


def test_padding_goes_with_whole_scales(any_scale: Upscaler) -> None:
    with pytest.raises(UserError, match=r"pre_pad goes with whole scales, not with 2\.5\. Omit it\."):
        enlarge_pixels(any_scale, PHOTOGRAPH, Settings(scale=2.5, pre_pad=4))


def test_the_package_has_the_api_without_loading_it_early(tmp_path: Path) -> None:
    code = (
        "import sys, esc_arch\n"
        "assert 'esc_arch.tools.upscale' not in sys.modules\n"
        "from esc_arch import load, upscale\n"
        "assert upscale is esc_arch.upscale and load is esc_arch.load\n"
        "try:\n    esc_arch.loda\nexcept AttributeError as error:\n    print(error)\n"
    )
    run = run_code(code, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "module 'esc_arch' has no attribute 'loda'" in run.stdout


def test_the_example_of_the_documentation(weights: Path) -> None:
    test = doctest.DocTestParser().get_doctest(upscale.__doc__ or "", {"weights": weights}, "upscale", None, None)
    assert len(test.examples) == 3
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
