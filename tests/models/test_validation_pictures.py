"""Pictures of validated images for TensorBoard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esc_arch.models.comparison import CAPTION, GAP, TB_PANEL, validation_picture

Visuals = dict[str, torch.Tensor]


def random_image(*size: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """Whole grey levels, so that nothing is rounded."""
    return torch.randint(256, (1, channels, *size), generator=torch.Generator().manual_seed(seed)) / 255


def levels(image: torch.Tensor) -> np.ndarray:
    return (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def panels(picture: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """The images below the captions; below these are details."""
    count = (picture.shape[1] + GAP) // (width + GAP)
    assert picture.dtype == np.uint8
    assert picture.shape == (CAPTION + height + GAP + height, count * (width + GAP) - GAP, 3)
    lefts = [index * (width + GAP) for index in range(count)]
    return [picture[CAPTION : CAPTION + height, left : left + width] for left in lefts]


def enlarged(lq: torch.Tensor, scale: int) -> np.ndarray:
    return np.kron(levels(lq), np.ones((scale, scale, 1), np.uint8))


def test_the_middle_of_lr_sr_and_gt_is_shown() -> None:
    height, width = 300, 200
    lq, gt, result = random_image(150, 100), random_image(height, width, seed=1), random_image(height, width, seed=2)
    shown = panels(validation_picture({"lq": lq, "result": result, "gt": gt}, "a"), TB_PANEL, width)
    middle = slice((height - TB_PANEL) // 2, (height + TB_PANEL) // 2)
    for panel, image in zip(shown, (enlarged(lq, 2), levels(result), levels(gt)), strict=True):
        assert np.array_equal(panel, image[middle])


def test_colours_are_rgb() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    picture = validation_picture({"lq": red[..., ::2, ::2], "result": red, "gt": red}, "")
    for panel in panels(picture, 8, 8):
        assert (panel == [255, 0, 0]).all()


def test_without_ground_truth_there_are_lr_and_sr() -> None:
    lq, result = random_image(4, 5), random_image(12, 15, seed=1)
    shown = panels(validation_picture({"lq": lq, "result": result}, "a"), 12, 15)
    assert len(shown) == 2
    assert np.array_equal(shown[0], enlarged(lq, 3))
    assert np.array_equal(shown[1], levels(result))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (TB_PANEL + 1, 3), (3, TB_PANEL + 1)])
def test_images_of_every_size(size: tuple[int, int]) -> None:
    gt = random_image(2 * size[0], 2 * size[1])
    picture = validation_picture({"lq": random_image(*size), "result": 1 - gt, "gt": gt}, "a")
    assert len(panels(picture, *(min(2 * side, TB_PANEL) for side in size))) == 3


def test_a_scale_that_is_not_whole() -> None:
    shown = panels(validation_picture({"lq": random_image(4, 6), "result": random_image(10, 15)}, "a"), 10, 15)
    assert {tuple(pixel) for pixel in shown[0].reshape(-1, 3)} == {
        tuple(pixel) for pixel in levels(random_image(4, 6)).reshape(-1, 3)
    }


def test_grey_images() -> None:
    gt = random_image(8, 8, channels=1)
    for panel in panels(validation_picture({"lq": gt[..., ::2, ::2], "result": gt, "gt": gt}, "a"), 8, 8)[1:]:
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
