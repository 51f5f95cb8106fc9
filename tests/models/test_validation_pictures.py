"""Pictures of validated images for TensorBoard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esc_arch.models.comparison import CAPTION, GAP, validation_picture
from esc_arch.models.comparison import TB_CROP as CROP
from esc_arch.models.comparison import TB_ZOOM as ZOOM

Visuals = dict[str, torch.Tensor]


def random_image(*size: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """Whole grey levels, so that nothing is rounded."""
    return torch.randint(256, (1, channels, *size), generator=torch.Generator().manual_seed(seed)) / 255


def levels(image: torch.Tensor) -> np.ndarray:
    return (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def panels(picture: np.ndarray, width: int) -> list[np.ndarray]:
    """What is below the captions, in its original size."""
    width *= ZOOM
    count = (picture.shape[1] + GAP) // (width + GAP)
    assert picture.shape[1] == count * (width + GAP) - GAP
    lefts = [index * (width + GAP) for index in range(count)]
    for left in lefts[1:]:
        assert (picture[:, left - GAP : left] == 255).all()
    shown = [picture[CAPTION:, left : left + width] for left in lefts]
    for panel in shown:
        assert np.array_equal(panel, np.kron(panel[::ZOOM, ::ZOOM], np.ones((ZOOM, ZOOM, 1), np.uint8)))
    return [panel[::ZOOM, ::ZOOM] for panel in shown]


def enlarged(lq: torch.Tensor, scale: int) -> np.ndarray:
    return np.kron(levels(lq), np.ones((scale, scale, 1), np.uint8))


def test_lr_sr_and_gt_are_cut_where_the_result_is_worst() -> None:
    scale, height, width = 2, 300, 200
    lq, gt = random_image(height // scale, width // scale), random_image(height, width, seed=1)
    result = gt.clone()
    result[..., 170:180, 60:160] = 1 - result[..., 170:180, 60:160]  # within a single crop of full width
    result[..., 52:180, 41] = 1 - result[..., 52:180, 41]
    picture = validation_picture({"lq": lq, "result": result, "gt": gt}, "a")
    assert picture.dtype == np.uint8
    assert picture.shape[0] == CAPTION + ZOOM * CROP
    shown = panels(picture, CROP)
    assert len(shown) == 3
    (place,) = [
        (top, left)
        for top in range(height - CROP + 1)
        for left in range(width - CROP + 1)
        if np.array_equal(levels(gt)[top : top + CROP, left : left + CROP], shown[2])
    ]
    top, left = place
    error = np.abs(levels(result).astype(int) - levels(gt)).sum(axis=2)
    sums = np.lib.stride_tricks.sliding_window_view(error, (CROP, CROP)).sum(axis=(2, 3))
    part = np.s_[top : top + CROP, left : left + CROP]
    assert error[part].sum() == sums.max() > 0
    assert np.array_equal(shown[1], levels(result)[part])
    assert np.array_equal(shown[0], enlarged(lq, scale)[part])


def test_colours_are_rgb() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    picture = validation_picture({"lq": red[..., ::2, ::2], "result": red, "gt": red}, "")
    for panel in panels(picture, 8):
        assert (panel == [255, 0, 0]).all()


def test_without_ground_truth_there_are_lr_and_sr() -> None:
    lq, result = random_image(4, 5), random_image(12, 15, seed=1)
    shown = panels(validation_picture({"lq": lq, "result": result}, "a"), 15)
    assert len(shown) == 2
    assert np.array_equal(shown[0], enlarged(lq, 3))
    assert np.array_equal(shown[1], levels(result))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (CROP + 1, 3), (3, CROP + 1)])
def test_images_of_every_size(size: tuple[int, int]) -> None:
    gt = random_image(2 * size[0], 2 * size[1])
    picture = validation_picture({"lq": random_image(*size), "result": 1 - gt, "gt": gt}, "a")
    height, width = (min(2 * side, CROP) for side in size)
    assert picture.shape == (CAPTION + ZOOM * height, 3 * ZOOM * width + 2 * GAP, 3)


def test_a_scale_that_is_not_whole() -> None:
    shown = panels(validation_picture({"lq": random_image(4, 6), "result": random_image(10, 15)}, "a"), 15)
    assert {tuple(pixel) for pixel in shown[0].reshape(-1, 3)} == {
        tuple(pixel) for pixel in levels(random_image(4, 6)).reshape(-1, 3)
    }


def test_grey_images() -> None:
    gt = random_image(8, 8, channels=1)
    for panel in panels(validation_picture({"lq": gt[..., ::2, ::2], "result": gt, "gt": gt}, "a"), 8)[1:]:
        assert np.array_equal(panel, levels(gt).repeat(3, axis=2))


def test_the_caption_names_the_image() -> None:
    visuals = {"lq": random_image(32, 32), "result": random_image(64, 64)}
    first, second = (validation_picture(visuals, name) for name in ("baby", "bird"))
    assert (first[:CAPTION] < 255).any()
    assert (first[:CAPTION] != second[:CAPTION]).any()
    assert np.array_equal(first[CAPTION:], second[CAPTION:])


def test_tensorboard_takes_it(tmp_path: object) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    picture = validation_picture({"lq": random_image(4, 4), "result": random_image(8, 8)}, "a")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_image("Set5/a", picture, 10, dataformats="HWC")
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("Set5/a")
    assert (image.step, image.height, image.width) == (10, *picture.shape[:2])
