"""Training at scales drawn per batch, and validation at any, as users run them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basicsr.data import build_dataloader, build_dataset
from basicsr.metrics import calculate_psnr
from basicsr.utils import tensor2img

from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.models.esc_lte_model import draw_batch
from esc_arch.ops.resize import matlab_resize, round_to_8bit

Options = dict[str, Any]


@pytest.fixture
def lte_options(train_options: Options, photographs: Any) -> Options:
    """Four iterations of a tiny ESCLTE, validated at x2.5. To be changed freely."""
    opt = train_options
    del opt["scale"], opt["network_g"]["upscaling_factor"]
    opt["model_type"] = "ESCLTEModel"
    opt["network_g"] |= {"type": "ESCLTE", "hidden_dim": 8, "mlp_dims": [8], "query_chunk": 500}
    opt["datasets"] = {
        "train": {
            "name": "Train",
            "type": "ArbitraryScaleDataset",
            "dataroot_gt": str(photographs.gt),
            "lq_size": 12,
            "sample_q": 50,
            "num_worker_per_gpu": 0,
            "batch_size_per_gpu": 2,
        },
        "val": {
            "name": "Cuts",
            "type": "ArbitraryScaleDataset",
            "dataroot_gt": str(photographs.val_gt),
            "scale": 2.5,
        },
    }
    for metric in opt["val"]["metrics"].values():
        metric["crop_border"] = "scale"
    return opt


def drawn(seed: int, scales: ScaleRange, batch: int = 3) -> tuple[Any, Any, Any]:
    size = scales.hr_size
    hr = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return hr, *draw_batch(hr, scales, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_has_one_scale_and_pixels_of_its_patches(seed: int) -> None:
    scales = ScaleRange(lq_size=6, scale_max=2.3, sample_q=30)
    hr, data, query = drawn(seed, scales)
    side = round(2 / float(query["cell"][0, 0]))
    assert 6 <= side <= 14 and torch.allclose(query["cell"], torch.full((3, 2), 2 / side))
    assert data["lq"].shape == (3, 3, 6, 6) and data["gt"].shape == (3, 3, 30)
    places = ((query["coords"] + 1) * side / 2 - 0.5).round().long()
    assert torch.allclose((places * 2 + 1) / side - 1, query["coords"], atol=1e-5)
    found = 0
    for top in range(14 - side + 1):
        for left in range(14 - side + 1):
            part = hr[:, :, top : top + side, left : left + side]
            if torch.equal(round_to_8bit(matlab_resize(part, (6, 6))), data["lq"]):
                found += 1
                for image, pixels, colours in zip(part, places, data["gt"], strict=True):
                    assert torch.equal(image[:, pixels[:, 0], pixels[:, 1]], colours)
                    assert len({tuple(pixel) for pixel in pixels.tolist()}) == 30
    assert found == 1


def test_what_is_drawn_depends_on_the_seed_alone_and_covers_the_range() -> None:
    scales = ScaleRange(lq_size=8)
    (_, data, query), (_, again, query_again) = drawn(1, scales), drawn(1, scales)
    assert torch.equal(data["lq"], again["lq"]) and torch.equal(query["coords"], query_again["coords"])
    sides = [round(2 / float(drawn(seed, scales, 1)[2]["cell"][0, 0])) for seed in range(200)]
    assert min(sides) in (8, 9) and max(sides) in (31, 32)
    assert abs(np.mean(sides) - 20) < 2


def test_at_scale_1_all_pixels_are_asked_for_and_known() -> None:
    hr, data, query = drawn(0, ScaleRange(lq_size=6, scale_max=1))
    assert query["coords"].shape == (3, 36, 2)
    assert torch.equal(data["lq"], round_to_8bit(hr))
    assert torch.equal(data["gt"].sort(-1).values, hr.flatten(2).sort(-1).values)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_validation_at_a_real_scale(run_basicsr: Any, lte_options: Options, workers: int) -> None:
    lte_options["datasets"]["train"]["num_worker_per_gpu"] = workers
    result = run_basicsr("train", lte_options)
    assert result.status == 0, result.err
    assert "Validation Cuts" in result.log() and "# psnr:" in result.log()
    assert set(torch.load(result.experiment() / "models/net_g_latest.pth", weights_only=True)) == {
        "params",
        "params_ema",
    }


def test_runs_repeat(run_basicsr: Any, lte_options: Options) -> None:
    weights = []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        run = run_basicsr("train", lte_options | {"name": name, "manual_seed": seed})
        assert run.status == 0, run.err
        weights.append(run.weights(name=name))
    equal = [[torch.equal(a[key], b[key]) for key in a] for a, b in (weights[:2], weights[1:])]
    assert all(equal[0]) and not all(equal[1])


def test_a_resumed_run_draws_what_comes_next(make_model: Any, lte_options: Options) -> None:
    lte_options["datasets"]["train"] |= {"phase": "train"}
    batch = next(iter(loader(lte_options["datasets"]["train"])))
    first, second = make_model(**lte_options), make_model(**lte_options)
    for iteration in range(1, 4):
        first.update_learning_rate(iteration)
        first.feed_data(batch)
        if iteration == 2:
            first.optimize_parameters(iteration)
            first.save_training_state(0, 2)
            state = torch.load(Path(first.opt["path"]["training_states"], "2.state"), weights_only=True)
            second.resume_training(state)
    second.update_learning_rate(3)
    second.feed_data(batch)
    assert torch.equal(first.lq, second.lq) and torch.equal(first.gt, second.gt)


def loader(options: Options) -> Any:
    return build_dataloader(build_dataset(options), options, num_gpu=0, seed=0)


def test_the_loss_falls(make_model: Any, lte_options: Options) -> None:
    torch.manual_seed(0)
    lte_options["datasets"]["train"] |= {"phase": "train", "batch_size_per_gpu": 2, "sample_q": 100}
    lte_options["network_g"] |= {"hidden_dim": 32, "mlp_dims": [32]}
    lte_options["train"]["scheduler"]["milestones"] = [1000]
    model = make_model(**lte_options)
    losses = []
    batch = next(iter(loader(lte_options["datasets"]["train"])))
    for iteration in range(1, 41):
        model.update_learning_rate(iteration)
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        losses.append(model.get_current_log()["l_pix"])
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10]), losses


@pytest.mark.parametrize("scale", [1, 2.5, 6, [2, 3.5]])
def test_validation_pads_the_image_and_asks_for_its_own_pixels(
    make_model: Any, lte_options: Options, scale: Any
) -> None:
    lte_options["datasets"]["val"] |= {"phase": "val", "scale": scale, "io_backend": {"type": "disk"}}
    lte_options["val"]["metrics"] = {"psnr": lte_options["val"]["metrics"]["psnr"]}
    model, data = make_model(**lte_options), loader(lte_options["datasets"]["val"])
    values = []
    net, steps = model.net_g_ema, (scale if isinstance(scale, list) else [scale, scale])
    for item in data:
        lq, gt = item["lq"], item["gt"]
        height, width = lq.shape[-2:]
        padded = F.pad(lq, (0, -width % 4, 0, -height % 4), mode="reflect")
        # Where the pixels of GT are in the padded image
        y, x = (
            ((torch.arange(n) + 0.5) / (n / of)) / whole * 2 - 1
            for n, of, whole in zip(gt.shape[-2:], lq.shape[-2:], padded.shape[-2:], strict=True)
        )
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
        cell = torch.tensor([[2 / (n / of * whole) for n, of, whole in
                              zip(gt.shape[-2:], lq.shape[-2:], padded.shape[-2:], strict=True)]])  # fmt: skip
        with torch.no_grad():
            result = net(padded, coords=coords[None], cell=cell).unflatten(-1, gt.shape[-2:])
        border = int(np.ceil(max(steps)))
        values.append(calculate_psnr(tensor2img([result]), tensor2img([gt]), crop_border=border, test_y_channel=True))
    model.nondist_validation(data, 1, None, save_img=False)
    assert model.metric_results["psnr"] == pytest.approx(np.mean(values), abs=1e-3)
    assert lte_options["val"]["metrics"]["psnr"]["crop_border"] == "scale"


def test_fixed_pairs_are_enlarged_by_the_scale_of_their_set(
    run_basicsr: Any, lte_options: Options, val_set: Options
) -> None:
    lte_options["datasets"]["val"] = val_set | {"scale": 2}
    result = run_basicsr("train", lte_options)
    assert result.status == 0, result.err
    assert "Validation Cuts" in result.log()


def test_pictures_of_the_comparison(run_basicsr: Any, lte_options: Options) -> None:
    lte_options["val"]["comparison"] = True
    result = run_basicsr("train", lte_options)
    assert result.status == 0, result.err
    pictures = sorted((result.experiment() / "visualization/comparison/Cuts").glob("*.png"))
    assert len(pictures) == 2 and cv2.imread(str(pictures[0])) is not None
    assert "PSNR (Y) on Cuts" in result.log()


def test_perceptual_losses_are_refused(run_basicsr: Any, lte_options: Options) -> None:
    opt = copy.deepcopy(lte_options)
    opt["train"]["perceptual_opt"] = {"type": "PerceptualLoss", "layer_weights": {"conv1_2": 1}}
    result = run_basicsr("train", opt)
    assert result.status == 2
    assert "train:perceptual_opt: ESCLTEModel trains on single pixels" in result.err
