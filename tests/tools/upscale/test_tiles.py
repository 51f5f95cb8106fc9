"""Fast tiling: seamless, near the whole image, and nearer the better the means are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inference_networks import Canvas, picture, plain, upscaler_of
from networks import max_error
from skimage.data import astronaut
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.tools.upscale import tiles
from esc_arch.tools.upscale.regions import Picture, Region
from esc_arch.tools.upscale.tails import folding_of
from esc_arch.tools.upscale.tiles import (
    _axis,
    _Gathering,
    _given,
    _reduced_means,
    _Run,
    _spans,
    _tiling,
    enlarge_in_tiles,
    through_blocks,
)


def tiled(upscaler: Any, image: np.ndarray, scale: float | None = None, **options: Any) -> Tensor:
    canvas = Canvas(*upscaler.output_size(*image.shape[:2], scale))
    enlarge_in_tiles(upscaler, image, canvas, scale=scale, **options)
    return canvas.finished()


NETWORKS = [
    ("ESC", {"upscaling_factor": 3}),
    ("ESCFP", {"upscaling_factor": 2}),
    ("ESCReal", {}),
    ("ESCReal", {"use_dysample": True, "upscaling_factor": 2}),
    ("ESCRealM", {"upscaling_factor": 2}),
    ("ESCRealM", {"upscaling_factor": 1, "upsampler": "pixelshuffle", "mid_dim": 8}),
    ("ESCRIB", {"rank": 4, "gate_type": "DWC", "upscaling_factor": 2}),
    ("ESCLTE", {"hidden_dim": 16, "mlp_dims": (16,), "upscaling_factor": 2.7}),
    ("ESCLTE", {"hidden_dim": 16, "mlp_dims": (16,), "upscaling_factor": 2, "normalize": True}),
]


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
@pytest.mark.parametrize("pools", ["tile", "image"])
def test_one_tile_is_the_whole(kind: str, options: dict[str, Any], pools: str) -> None:
    upscaler = upscaler_of(kind, **options)
    image = picture(21, 30)
    error = max_error(tiled(upscaler, image, tile=64, pools=pools), plain(upscaler, image))
    assert error < 1e-5 * (3 if "use_dysample" in options else 1)


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
@pytest.mark.parametrize("size", [(150, 24), (24, 150)])
def test_without_pooled_kernels_only_borders_differ(kind: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    """Far from the borders of tiles the whole image comes out, and where they overlap something near it."""
    upscaler = upscaler_of(kind, n_blocks=1, conv_blocks=1, **options)
    for block in upscaler.net.blocks:
        for pconv in block.pconvs:  # the last convolution of what makes the kernels
            for parameter in list(pconv.plk.parameters())[2:]:
                parameter.zero_()
    folding = folding_of(upscaler.net)
    image = picture(*(length * folding for length in size))
    result = tiled(upscaler, image, tile=64 * folding, overlap=16 * folding, pools="tile")
    expected = plain(upscaler, image)
    difference = (result - expected).abs().amax(0)
    assert 0 < difference.mean() < 0.1 * expected.std()
    assert difference.flatten().quantile(0.25) < 1e-5


@pytest.mark.parametrize("pools", ["image", "reduced", "tile"])
def test_every_pixel_once(pools: str) -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    told: list[float] = []
    result = tiled(upscaler, picture(50, 70), tile=24, overlap=8, pools=pools, progress=told.append)
    assert result.isfinite().all()
    assert told == sorted(told)
    assert told[-1] == 1


def test_common_means_give_a_nearer_picture() -> None:
    """Of a picture whose halves have little in common."""
    upscaler = upscaler_of("ESC", upscaling_factor=2, kernel_size=3)
    image = np.concatenate([picture(64, 96) // 8, astronaut()[:64, 100:196]], axis=1)
    expected = plain(upscaler, image)
    errors = {
        pools: (tiled(upscaler, image, tile=64, overlap=16, pools=pools) - expected).square().mean().sqrt().item()
        for pools in ("image", "reduced", "tile")
    }
    assert max(errors["image"], errors["reduced"]) < 0.5 * errors["tile"], errors


def test_a_run_before_finds_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the image made small are near, those of all tiles are nearer."""
    monkeypatch.setattr(tiles, "REDUCED_PIXELS", 48**2)
    upscaler = upscaler_of("ESC", upscaling_factor=2, n_blocks=1)
    image = astronaut()[100:300:2, 100:340:2]
    tiling = _tiling(upscaler, image, 48, 24, None)
    exact = _Gathering()
    x = tiling.picture.read(Region(0, 0, tiling.picture.height, tiling.picture.width), torch.device("cpu"))
    through_blocks(upscaler.net, upscaler.net.shallow_features(x), exact)
    reduced = _reduced_means(upscaler, tiling.picture)
    gathered = _Run(upscaler, tiling, None, 1).gather_means(_given(reduced))
    errors = [max(max_error(means[key], exact.means()[key]) for key in means) for means in (gathered, reduced)]
    assert errors[0] < 0.5 * errors[1], errors


def test_means_of_the_image_are_those_of_its_tiles() -> None:
    """Each pixel is counted once, whatever the overlap."""
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    gathering = _Gathering()
    x = torch.rand(1, 8, 20, 36)
    for first, last, part in ((0, 24, slice(0, 20)), (16, 36, slice(4, 20))):
        gathering.part = (slice(None), part)
        gathering(0, 0, x[..., first:last])
    assert torch.allclose(gathering.means()[0, 0], x.mean((2, 3)))
    own = through_blocks(upscaler.net, x, lambda *_: None)
    assert torch.equal(own, upscaler.net.run_blocks(x, *upscaler.net.large_kernels()))


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(8, 16, 8), (64, 16, 8), (72, 32, 8), (100, 24, 16), (70, 16, 0)]
)
def test_tiles_begin_at_windows_and_their_weights_make_one(length: int, tile: int, overlap: int) -> None:
    spans = _spans(length, tile, overlap, 8)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(first % 8 == 0 for first, _ in spans)
    assert all(min(tile, length) <= last - first < tile + 8 for first, last in spans)
    axis = _axis(length, 3 * length, 1, tile, overlap, 8)
    total = torch.zeros(3 * length)
    for (first, last), weights in zip(axis.pixels, axis.weights, strict=True):
        total[first:last] += weights
    assert torch.allclose(total, torch.ones(3 * length))
    if overlap:  # no step where a tile begins or ends
        inner = [weights[0] for weights, (first, _) in zip(axis.weights, axis.pixels, strict=True) if first]
        assert all(weight < 1.1 / (3 * overlap) for weight in inner)


def test_sizes_are_rounded_up_to_windows() -> None:
    upscaler = upscaler_of("ESCRealM", upscaling_factor=2)  # folds by 2
    tiling = _tiling(upscaler, picture(100, 100), 20, 3, None)
    assert tiling.rows.tiles[:2] == [(0, 16), (8, 24)]
    assert _tiling(upscaler, picture(100, 100), 9, None, None).rows.tiles[:2] == [(0, 8), (8, 16)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, r"tile: 0 given; must be at least 1, and is rounded up to multiples of 8"),
        (
            {"tile": 16, "overlap": 9},
            r"overlap: 9 given, which is 16 in whole windows; must be less than the tile",
        ),
        ({"tile": 16, "pools": "none"}, r"pools: 'none' given; must be one of image, reduced, tile"),
        ({"tile": 16, "scale": 5}, r"trial\.pth enlarges by 2, not by 5"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        enlarge_in_tiles(upscaler_of("ESC", upscaling_factor=2), picture(20, 20), Canvas(40, 40), **options)


def test_a_picture_is_padded_without_a_copy() -> None:
    image = picture(5, 9)
    padded = Picture(image, 8, 3)
    assert (padded.height, padded.width) == (9, 18)
    twice = np.pad(np.pad(image, ((0, 3), (0, 7), (0, 0)), "reflect"), ((0, 1), (0, 2), (0, 0)), "reflect")
    region = padded.read(Region(0, 0, 9, 18), torch.device("cpu"))[0].permute(1, 2, 0)
    assert torch.equal(region, torch.from_numpy(twice / np.float32(255)))
