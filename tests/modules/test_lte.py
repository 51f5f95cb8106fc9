"""LTE against its formulas, computed point by point in float64 as LIIF and LTE state them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.modules import LTE
from esc_arch.modules.lte import query_grid

SIZES = [(1, 1), (1, 5), (4, 1), (4, 3)]


def make(seed: int = 0, **options: object) -> LTE:
    """A small one in float64, all of its parameters random."""
    generator = torch.Generator().manual_seed(seed)
    lte = LTE(4, **({"hidden_dim": 6, "mlp_dims": (5, 7)} | options)).double()  # type: ignore[arg-type]
    for parameter in lte.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return lte


def inputs(height: int, width: int, points: int = 20, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 10 + width)
    features, image, coords = (
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, 4, height, width), (batch, 3, height, width), (batch, points, 2))
    )
    cell = torch.tensor([[2 / (2.5 * height), 2 / (3 * width)], [2 / height, 2 / (1.2 * width)]], dtype=torch.float64)
    return features - 0.5, image, coords * 2 - 1, cell[:batch]


def colour_of_point(lte: LTE, coef: Tensor, freq: Tensor, image: Tensor, point: Tensor, cell: Tensor) -> Tensor:
    """One point (2,) of one map (C, H, W): LIIF's local ensemble, with its shifts and areas, of LTE's estimates."""
    sides = image.shape[-2:]
    weight = lte.phase.weight.tolist()
    estimates, areas = [], []
    for shift in itertools.product((-1, 1), (-1, 1)):
        pixel, way = [], []
        for axis, n in enumerate(sides):
            shifted = float(point[axis]) + shift[axis] / n
            pixel.append(min(max(math.floor((shifted + 1) / 2 * n), 0), n - 1))
            way.append((float(point[axis]) - (-1 + (2 * pixel[axis] + 1) / n)) * n)
        y, x = pixel
        angles = []
        for k in range(lte.phase.out_features):
            extent = [max(float(cell[axis]) * sides[axis], 2 / lte.max_scale) for axis in range(2)]
            phase = sum(weight[k][axis] * extent[axis] for axis in range(2))
            angles.append(float(freq[2 * k, y, x]) * way[0] + float(freq[2 * k + 1, y, x]) * way[1] + phase)
        waves = [math.cos(math.pi * a) for a in angles] + [math.sin(math.pi * a) for a in angles]
        estimates.append(lte.imnet(coef[:, y, x] * torch.tensor(waves, dtype=torch.float64)))
        areas.append(abs(way[0] * way[1]))
    # The area of the pixel diagonally opposite is the weight of each
    colour = sum(e * a for e, a in zip(estimates, reversed(areas), strict=True)) / sum(areas)
    skip = F.grid_sample(
        image[None], point.flip(0)[None, None, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return colour + skip.flatten()


def colours_plainly(lte: LTE, features: Tensor, image: Tensor, coords: Tensor, cell: Tensor) -> Tensor:
    coef, freq = lte.coef(features), lte.freq(features)
    return torch.stack(
        [
            torch.stack([colour_of_point(lte, *maps, point, extent) for point in points], dim=-1)
            for *maps, points, extent in zip(coef, freq, image, coords, cell, strict=True)
        ]
    )


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_the_formulas(size: tuple[int, int]) -> None:
    lte, given = make(), inputs(*size)
    assert torch.allclose(lte(*given), colours_plainly(lte, *given), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_whole_scales_ask_at_and_beyond_pixel_centres(size: tuple[int, int]) -> None:
    lte, (features, image, _, _) = make(), inputs(*size)
    for scale in (1, 3):
        coords, cell = (t.double().expand(2, *t.shape) for t in query_grid((size[0] * scale, size[1] * scale)))
        # At the centre of a pixel on the border all four of LIIF's areas are 0: what counts is their limit
        expected = colours_plainly(lte, features, image, coords + 1e-7, cell)
        assert torch.allclose(lte(features, image, coords, cell), expected, atol=1e-5)


@torch.no_grad()
def test_without_texture_the_image_is_enlarged_bilinearly() -> None:
    lte = make()
    for parameter in lte.imnet[-1].parameters():
        parameter.zero_()
    features, image, _, _ = inputs(5, 4)
    coords, cell = query_grid((13, 9))
    result = lte(features, image, coords.double().expand(2, -1, -1), cell.double().expand(2, -1)).unflatten(-1, (13, 9))
    expected = F.interpolate(image, (13, 9), mode="bilinear", align_corners=False)
    assert torch.allclose(result, expected, atol=1e-6)


@torch.no_grad()
def test_chunks_change_nothing() -> None:
    lte, given = make(), inputs(6, 5)
    expected = lte(*given)
    for chunk in (1, 2, 7, 13, 40, 1000):
        assert torch.allclose(lte(*given, chunk=chunk), expected, atol=1e-14)


@torch.no_grad()
def test_a_chunk_is_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    lte, given = make(), inputs(6, 5)
    shapes = []
    lte.imnet.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    lte(*given, chunk=16)  # 8 points of each of the 2 images, 4 pixels around each
    assert shapes == [(64, 6), (64, 6), (32, 6)]


def test_gradients() -> None:
    lte, (features, image, coords, cell) = make(), inputs(2, 2, points=3, batch=1)
    features.requires_grad_()
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, i: lte(f, i, coords, cell, chunk=2), (features, image))


@torch.no_grad()
def test_cells_beyond_the_largest_scale() -> None:
    lte, (features, image, coords, _) = make(max_scale=4), inputs(4, 4)

    def at(scale: float) -> Tensor:
        return lte(features, image, coords, torch.full((2, 2), 2 / (4 * scale), dtype=torch.float64))

    assert torch.equal(at(8), at(4))
    assert not torch.allclose(at(3), at(4))


def test_half_precision_keeps_positions() -> None:
    lte = make().to(torch.bfloat16)
    features, image, coords, cell = inputs(6, 5)
    with torch.no_grad():
        expected = make()(features, image, coords, cell)
        result = lte(features.bfloat16(), image.bfloat16(), coords.float(), cell.float())
    assert result.dtype == torch.bfloat16
    assert (result - expected).abs().max() < 0.1


def test_grid() -> None:
    coords, cell = query_grid((2, 4))
    assert cell.tolist() == [1.0, 0.5]
    assert coords[:, 0].tolist() == [-0.5] * 4 + [0.5] * 4
    assert coords[:4, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    part, part_cell = query_grid((2, 4), part=(0.5, 1))
    assert part_cell.tolist() == [0.5, 0.5]
    assert part[:, 0].tolist() == [-0.75] * 4 + [-0.25] * 4
    assert torch.equal(part[:, 1], coords[:, 1])


def test_errors() -> None:
    with pytest.raises(ValueError, match="hidden_dim is 7; it must be even"):
        LTE(4, hidden_dim=7)
    with pytest.raises(ValueError, match=r"mlp_dims are \[8, 0\]; each must be at least 1"):
        LTE(4, mlp_dims=[8, 0])
    with pytest.raises(ValueError, match="max_scale is 0; it must be a number above 0"):
        LTE(4, max_scale=0)
