"""Both stages of ESC-Real's training on the CPU: degradations, targets, the pipeline, and its errors."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import vgg_arch
from basicsr.data.degradations import random_add_gaussian_noise_pt, random_add_poisson_noise_pt
from basicsr.data.transforms import paired_random_crop
from basicsr.utils import DiffJPEG, USMSharp
from basicsr.utils.img_process_util import filter2D
from basicsr.utils.registry import MODEL_REGISTRY
from cv2 import imread
from small_real import small_vgg19, use_small_images, use_small_vgg19
from torch import Tensor

from esc_arch.models import ESCRealGANModel, ESCRealMSEModel

ROOT = Path(__file__).parents[2]
Options = dict[str, Any]

DEGRADATIONS: Options = {
    "resize_prob": [0.2, 0.7, 0.1],
    "resize_range": [0.3, 1.5],  # published from 0.15 on, which of 64 pixels leaves fewer than the blur needs
    "gaussian_noise_prob": 0.5,
    "noise_range": [1, 30],
    "poisson_scale_range": [0.05, 3],
    "gray_noise_prob": 0.4,
    "jpeg_range": [30, 95],
    "second_blur_prob": 0.8,
    "resize_prob2": [0.3, 0.4, 0.3],
    "resize_range2": [0.3, 1.2],
    "gaussian_noise_prob2": 0.5,
    "noise_range2": [1, 25],
    "poisson_scale_range2": [0.05, 2.5],
    "gray_noise_prob2": 0.4,
    "jpeg_range2": [30, 95],
}
KERNELS: Options = {
    f"{key}{stage}": value
    for stage in ("", "2")
    for key, value in {
        "blur_kernel_size": 21,
        "kernel_list": ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"],
        "kernel_prob": [0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
        "sinc_prob": 0.1,
        "blur_sigma": [0.2, 3],
        "betag_range": [0.5, 4],
        "betap_range": [1, 2],
    }.items()
} | {"final_sinc_prob": 0.8}
MODEL_TYPES = {"mse": "ESCRealMSEModel", "gan": "ESCRealGANModel"}


@pytest.fixture
def real_options(train_options: Options, photographs: Any) -> Callable[[str], Options]:
    """`train_options` of a stage, with a tiny ESCReal and patches of 8 x 8."""

    def options(stage: str) -> Options:
        opt: Options = copy.deepcopy(train_options) | DEGRADATIONS
        opt |= {"scale": 4, "model_type": MODEL_TYPES[stage], "gt_size": 32, "queue_size": 5}
        opt["network_g"] |= {"type": "ESCReal", "upscaling_factor": 4}
        train_set = opt["datasets"]["train"]
        train_set |= KERNELS | {"type": "RealESRGANDataset", "dataroot_gt": str(photographs.gt_lmdb)}
        train_set |= {"io_backend": {"type": "lmdb"}}
        for key in ("dataroot_lq", "filename_tmpl", "gt_size"):
            del train_set[key]
        # Without ground truth, for that of scale 4 is not available
        opt["datasets"]["val"] = {"name": "Cuts", "type": "SingleImageDataset", "dataroot_lq": str(photographs.val_lq)}
        opt["val"] = {"val_freq": 2, "save_img": True}
        if stage == "mse":
            return opt | {"gt_usm": True}
        opt |= {"l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False}
        opt["network_d"] = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4, "skip_connection": True}
        layers = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1}
        opt["train"] |= {
            "optim_d": {"type": "Adam", "lr": 1e-4},
            "perceptual_opt": {"type": "PerceptualLoss", "layer_weights": layers, "criterion": "l1"},
            "gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1},
        }
        return opt

    return options


@pytest.fixture(autouse=True)
def small_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_vgg19(monkeypatch)


@pytest.fixture
def make_real_model(real_options: Callable[[str], Options], make_model: Callable[..., Any]) -> Callable[..., Any]:
    return lambda stage, **changes: make_model(**(real_options(stage) | changes))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """What RealESRGANDataset gives, of smaller images: gt (2, 3, 64, 64), kernels (2, 21, 21)."""
    generator = torch.Generator().manual_seed(0)
    gt = F.interpolate(torch.rand(2, 3, 16, 16, generator=generator), size=(64, 64), mode="bicubic").clamp(0, 1)
    kernels = {key: torch.rand(2, 21, 21, generator=generator) for key in ("kernel1", "kernel2", "sinc_kernel")}
    return {"gt": gt} | {key: kernel / kernel.sum((1, 2), keepdim=True) for key, kernel in kernels.items()}


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_names() -> None:
    for name, model in {"MSE": ESCRealMSEModel, "GAN": ESCRealGANModel}.items():
        assert MODEL_REGISTRY.get(f"ESCReal{name}Model") is MODEL_REGISTRY.get(f"RealHAT{name}Model") is model


# --- degradations ---------------------------------------------------------------------------------------------------


def degraded(opt: Options, image: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Section 3 of Real-ESRGAN's paper with BasicSR's functions: (B, 3, H, W) -> (B, 3, H / scale, W / scale)."""
    height, width = image.shape[2:]
    small = height // opt["scale"], width // opt["scale"]
    jpeg = DiffJPEG(differentiable=False)

    def size_factor(stage: str) -> float:
        kind = random.choices(["up", "down", "keep"], opt[f"resize_prob{stage}"])[0]
        low, high = opt[f"resize_range{stage}"]
        return {"up": lambda: np.random.uniform(1, high), "down": lambda: np.random.uniform(low, 1)}.get(
            kind, lambda: 1
        )()

    def any_mode() -> str:
        return random.choice(["area", "bilinear", "bicubic"])

    def noisy(x: Tensor, stage: str) -> Tensor:
        common = {"gray_prob": opt[f"gray_noise_prob{stage}"], "clip": True, "rounds": False}
        if np.random.uniform() < opt[f"gaussian_noise_prob{stage}"]:
            return random_add_gaussian_noise_pt(x, sigma_range=opt[f"noise_range{stage}"], **common)
        return random_add_poisson_noise_pt(x, scale_range=opt[f"poisson_scale_range{stage}"], **common)

    def compressed(x: Tensor, stage: str) -> Tensor:
        quality = torch.empty(len(x)).uniform_(*opt[f"jpeg_range{stage}"])
        return jpeg(x.clamp(0, 1), quality=quality).contiguous()

    x = filter2D(image, data["kernel1"])
    factor = size_factor("")
    x = compressed(noisy(F.interpolate(x, scale_factor=factor, mode=any_mode()), ""), "")
    if np.random.uniform() < opt["second_blur_prob"]:
        x = filter2D(x, data["kernel2"])
    factor = size_factor("2")
    size = int(height / opt["scale"] * factor), int(width / opt["scale"] * factor)
    x = noisy(F.interpolate(x, size=size, mode=any_mode()), "2")
    if np.random.uniform() < 0.5:
        x = filter2D(F.interpolate(x, size=small, mode=any_mode()), data["sinc_kernel"])
        x = compressed(x, "2")
    else:
        x = compressed(x, "2")
        x = filter2D(F.interpolate(x, size=small, mode=any_mode()), data["sinc_kernel"])
    return (x * 255).round().clamp(0, 255) / 255


@pytest.mark.parametrize("stage", MODEL_TYPES)
def test_degradations_are_basicsr_s(stage: str, make_real_model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = make_real_model(stage, queue_size=0)
    for seed in range(8):
        seed_all(seed)
        model.feed_data(batch)
        seed_all(seed)
        sharp = USMSharp()(batch["gt"])
        lq = degraded(model.opt, sharp, batch)
        gt, lq = paired_random_crop(sharp if stage == "mse" else batch["gt"], lq, 32, 4)
        assert torch.equal(model.lq, lq) and torch.equal(model.gt, gt)
        assert model.lq.shape == (2, 3, 8, 8) and model.lq.is_contiguous()


@pytest.mark.parametrize("stage", MODEL_TYPES)
def test_any_memory_layout(stage: str, make_real_model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    """A loader's batches may be permuted views, as the images of which they are made are."""
    model = make_real_model(stage, queue_size=0)
    permuted = {key: value.transpose(-1, -2).contiguous().transpose(-1, -2) for key, value in batch.items()}
    permuted["gt"] = batch["gt"].to(memory_format=torch.channels_last)
    assert not any(value.is_contiguous() for value in permuted.values())
    seed_all(0)
    model.feed_data(batch)
    expected = model.lq, model.gt
    seed_all(0)
    model.feed_data(permuted)
    assert torch.allclose(model.lq, expected[0], atol=1.01 / 255) and torch.allclose(model.gt, expected[1], atol=1e-6)


def test_one_image_a_batch(make_real_model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = make_real_model("gan")
    for _ in range(7):  # beyond the queue of 5
        model.feed_data({key: value[:1] for key, value in batch.items()})
        assert model.lq.shape == (1, 3, 8, 8) and model.gt.shape == model.gt_usm.shape == (1, 3, 32, 32)
    assert len(model.pool.pairs) == 5


def test_pairs_as_they_are(make_real_model: Callable[..., Any]) -> None:
    model = make_real_model("gan", high_order_degradation=False)
    pair = {"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 32, 32)}
    model.feed_data(pair)
    assert torch.equal(model.lq, pair["lq"]) and torch.equal(model.gt, pair["gt"])
    assert torch.equal(model.gt_usm, USMSharp()(pair["gt"]))


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpened", [True, False])
def test_l1_stage_target(sharpened: bool, make_real_model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = make_real_model("mse", gt_usm=sharpened, gt_size=64, queue_size=0)
    model.feed_data(batch)
    assert torch.equal(model.gt, USMSharp()(batch["gt"]) if sharpened else batch["gt"])
    assert not torch.equal(USMSharp()(batch["gt"]), batch["gt"])


@pytest.mark.parametrize("sharpened", [(True, True, False), (False, True, True), (True, False, True)])
def test_gan_stage_targets(
    sharpened: tuple[bool, ...], make_real_model: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    keys = ("l1_gt_usm", "percep_gt_usm", "gan_gt_usm")
    model = make_real_model("gan", gt_size=64, queue_size=0, **dict(zip(keys, sharpened, strict=True)))
    seen: dict[str, Tensor] = {}
    model.cri_pix.register_forward_pre_hook(lambda _, inputs: seen.update(l1_gt_usm=inputs[1]))
    model.cri_perceptual.register_forward_pre_hook(lambda _, inputs: seen.update(percep_gt_usm=inputs[1]))
    # The discriminator sees the result, the target, and the result again
    calls: list[Tensor] = []
    model.net_d.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    model.feed_data(batch)
    model.optimize_parameters(1)
    seen["gan_gt_usm"] = calls[1]
    for key, sharp in zip(keys, sharpened, strict=True):
        assert torch.equal(seen[key], USMSharp()(batch["gt"]) if sharp else batch["gt"]), key


def test_gan_stage_trains_both_networks(make_real_model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = make_real_model("gan")
    before = {name: copy.deepcopy(net.state_dict()) for name, net in (("g", model.net_g), ("d", model.net_d))}
    model.feed_data(batch)
    model.optimize_parameters(1)
    losses = model.get_current_log()
    assert losses.keys() == {"l_g_pix", "l_g_percep", "l_g_gan", "l_d_real", "out_d_real", "l_d_fake", "out_d_fake"}
    assert all(np.isfinite(value) for value in losses.values())
    for name, net in (("g", model.net_g), ("d", model.net_d)):
        changed = [key for key, value in net.named_parameters() if not torch.equal(value, before[name][key])]
        assert changed, name
    averaged = dict(model.net_g_ema.named_parameters())
    for key, value in model.net_g.named_parameters():
        expected = 0.5 * before["g"][key] + 0.5 * value  # EMA with decay 0.5
        assert torch.allclose(averaged[key], expected, atol=1e-7)


# --- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_images(monkeypatch)


@pytest.mark.parametrize("stage", MODEL_TYPES)
def test_training_and_resuming(
    stage: str, real_options: Callable[[str], Options], run_basicsr: Any, small_images: None
) -> None:
    opt = real_options(stage)
    result = run_basicsr("train", opt)
    assert result.status == 0, result.err
    assert ("l_g_percep" in result.log()) == (stage == "gan")
    for name, (height, width) in {"val0x2": (24, 16), "val1x2": (21, 27)}.items():
        pictures = list((result.experiment() / "visualization" / name).glob("*.png"))
        assert len(pictures) == 2  # at 2 and 4; the one at the end is of 4, too
        assert imread(str(pictures[0])).shape == (4 * height, 4 * width, 3)
    opt["train"]["total_iter"] = 6
    resumed = run_basicsr("train", opt, "--auto_resume")
    assert resumed.status == 0, resumed.err
    assert "Resuming training from epoch: 1, iter: 4." in resumed.log()
    models = {path.name for path in (result.experiment() / "models").iterdir()}
    nets = {"net_g", "net_d"} if stage == "gan" else {"net_g"}
    assert models == {f"{net}_{label}.pth" for net in nets for label in (2, 4, 6, "latest")}
    if stage == "gan":
        assert "Loaded UNetDiscriminatorSN from" in resumed.log()


@pytest.mark.parametrize("more", [(), ("datasets:train:meta_info=~",), ("datasets:train:meta_info=list.txt",)])
def test_published_files_run_with_other_paths(
    more: tuple[str, ...], run_basicsr: Any, photographs: Any, small_images: None
) -> None:
    """Both stages; without a list of images the folder is gone through. Only sizes are changed beside paths."""
    small = (
        f"datasets:train:dataroot_gt={photographs.gt}", "datasets:train:num_worker_per_gpu=0", "num_gpu=0",
        "datasets:train:batch_size_per_gpu=2", "gt_size=32", "queue_size=4", "train:total_iter=3", "network_g:dim=8",
        "network_g:pdim=4", "network_g:kernel_size=3", "network_g:n_blocks=1", "network_g:conv_blocks=1",
        "network_g:window_size=4", "network_g:num_heads=2", "logger:use_tb_logger=false",
    )  # fmt: skip
    names = sorted(path.name for path in photographs.gt.iterdir())
    used = names[:2] if "list.txt" in "".join(more) else names
    (run_basicsr.folder / "list.txt").write_text("".join(f"{name} (48,48,3)\n" for name in used))
    for stage in MODEL_TYPES:
        file = str(ROOT / f"tests/options/published/train_ESCReal_x4_{stage}.yml")
        smaller = ("network_d:num_feat=4",) if stage == "gan" else ()
        result = run_basicsr("train", file, "--force_yml", *small, *smaller, *more)
        assert result.status == 0, result.err
        name = f"train_ESCReal_x4_{stage}"
        assert f"Number of train images: {len(used)}" in result.log(name)
        assert f"Model [{MODEL_TYPES[stage]}] is created." in result.log(name)
        assert (result.experiment(name) / "models/net_g_latest.pth").is_file()


def test_gan_stage_starts_from_the_l1_stage(
    real_options: Callable[[str], Options], run_basicsr: Any, small_images: None
) -> None:
    first = real_options("mse") | {"name": "mse"}
    assert run_basicsr("train", copy.deepcopy(first)).status == 0
    opt = real_options("gan") | {"name": "gan", "model_type": "RealHATGANModel"}
    opt["path"] |= {"pretrain_network_g": "experiments/mse/models/net_g_latest.pth", "param_key_g": "params_ema"}
    opt["train"] |= {"net_d_init_iters": 99}  # the generator waits for the discriminator
    result = run_basicsr("train", opt)
    assert result.status == 0, result.err
    start = torch.load(result.folder / "experiments/mse/models/net_g_latest.pth", weights_only=True)["params_ema"]
    for key, value in result.weights(name="gan").items():
        assert torch.equal(value, start[key]), key


def test_testing_several_sets(real_options: Callable[[str], Options], run_basicsr: Any) -> None:
    opt = real_options("gan")
    cuts = opt["datasets"]["val"]
    opt["datasets"] = {"test_1": cuts | {"name": "One"}, "test_2": cuts | {"name": "Two"}}
    result = run_basicsr("test", opt)
    assert result.status == 0, result.err
    for name in ("One", "Two"):
        assert len(list((result.folder / "results" / "trial" / "visualization" / name).glob("*.png"))) == 2


def test_validation_of_tiny_images(make_real_model: Callable[..., Any]) -> None:
    """Smaller than sharpening can take, and no multiple of the window."""
    model = make_real_model("gan")
    model.is_train = False
    model.feed_data({"lq": torch.rand(1, 3, 5, 3), "gt": torch.rand(1, 3, 20, 12)})
    model.test()
    assert model.output.shape == (1, 3, 20, 12)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_missing_vgg_weights(
    real_options: Callable[[str], Options],
    run_basicsr: Any,
    small_images: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_network(pretrained: bool) -> Any:
        if pretrained:
            raise URLError("no network")
        return small_vgg19(pretrained)

    monkeypatch.setattr(vgg_arch.vgg, "vgg19", without_network)
    opt = real_options("gan")
    result = run_basicsr("train", copy.deepcopy(opt))
    place = result.folder / "experiments/pretrained_models/vgg19-dcbb9e9d.pth"
    assert result.status == 2 and "Traceback" not in result.err
    assert "VGG19 weights for the perceptual loss could not be downloaded" in result.err
    assert "no network" in result.err and f"put it at {place} or in" in result.err
    place.parent.mkdir(parents=True)
    torch.save(small_vgg19(False).state_dict(), place)
    result = run_basicsr("train", opt)
    assert result.status == 0, result.err


@pytest.mark.parametrize("stage", MODEL_TYPES)
def test_option_problems(stage: str, real_options: Callable[[str], Options], run_basicsr: Any) -> None:
    opt = real_options(stage)
    usm = "gt_usm" if stage == "mse" else "percep_gt_usm"
    opt |= {"resize_prob": [0.5, 0.5], "jpeg_range2": 30, "queue_size": -1, usm: "yes"}
    del opt["noise_range"]
    result = run_basicsr("train", opt)
    assert result.status == 2 and not result.experiment().exists()
    for message in (
        "5 problem(s)",
        "resize_prob: [0.5, 0.5] given; must be a list of 3 numbers",
        "jpeg_range2: 30 given; must be a list of 2 numbers",
        f"noise_range: missing; {MODEL_TYPES[stage]} makes LQ images with it",
        "queue_size: -1 given; must be a whole number",
        f"{usm}: 'yes' given; must be true or false",
    ):
        assert message in result.err


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (30, "gt_size: 30 given; must be a multiple of scale 4"),
        (404, "gt_size: 404 given; RealESRGANDataset cuts images to 400 pixels: give no more"),
        (None, "gt_size: missing; ESCRealMSEModel makes LQ images with it"),
    ],
)
def test_gt_size_problems(
    size: int | None, message: str, real_options: Callable[[str], Options], run_basicsr: Any
) -> None:
    result = run_basicsr("train", real_options("mse") | {"gt_size": size})
    assert result.status == 2 and message in result.err


def test_gan_stage_needs_a_discriminator(real_options: Callable[[str], Options], run_basicsr: Any) -> None:
    opt = real_options("gan")
    del opt["network_d"], opt["train"]["optim_d"], opt["train"]["gan_opt"]
    result = run_basicsr("train", opt)
    assert result.status == 2
    assert "network_d: missing; this model needs the discriminator" in result.err
    for key in ("optim_d", "gan_opt"):
        assert f"train:{key}: missing; ESCRealGANModel needs it" in result.err
