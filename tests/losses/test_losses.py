"""The losses beyond BasicSR's, against independent originals, and how option files name them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from skimage.metrics import structural_similarity
from torch import Tensor

from esc_arch import FFTLoss, LPIPSLoss, SSIMLoss, UserError
from esc_arch.options import check_options

FFT = {"type": "FFTLoss", "loss_weight": 0.05}
LPIPS_STUB = """
import torch

class LPIPS(torch.nn.Module):
    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.seen = net, []
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, a, b):
        self.seen += [a, b]
        return self.scale * (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)
"""


def images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=random)
    return (target + 0.1 * torch.randn(shape, generator=random)).clamp(0, 1), target


@pytest.fixture
def lpips_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips.py").write_text(LPIPS_STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lpips", raising=False)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_fft_loss_is_that_of_numpy(norm: Any, size: tuple[int, int]) -> None:
    pred, target = images(2, 3, *size)
    spectra = [np.fft.rfft2(x.double().numpy(), norm=norm) for x in (pred, target)]
    difference = spectra[0] - spectra[1]
    expected = np.concatenate([np.abs(difference.real), np.abs(difference.imag)])
    assert FFTLoss(norm=norm)(pred, target).item() == pytest.approx(expected.mean(), rel=1e-5)
    summed = FFTLoss(loss_weight=0.5, reduction="sum", norm=norm)(pred, target)
    assert summed.item() == pytest.approx(0.5 * expected.sum(), rel=1e-5)


@pytest.mark.parametrize("size", [(11, 11), (24, 17)])
def test_ssim_loss_is_that_of_skimage(size: tuple[int, int]) -> None:
    pred, target = images(2, 3, *size)
    expected = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0
        )
        for a, b in zip(pred.double().numpy(), target.double().numpy(), strict=True)
    ]
    assert 0.1 < np.mean(expected) < 0.99
    assert SSIMLoss(loss_weight=2)(pred, target).item() == pytest.approx(2 * (1 - np.mean(expected)), abs=1e-5)
    for layout in (torch.contiguous_format, torch.channels_last):
        pred, target = (x.contiguous(memory_format=layout) for x in (pred, target))
        assert SSIMLoss()(pred, target).item() == pytest.approx(1 - np.mean(expected), abs=1e-5)
    assert abs(SSIMLoss()(target, target).item()) < 1e-6


def test_lpips_loss_gets_values_from_minus_1_to_1(lpips_stub: None) -> None:
    pred, target = images(2, 3, 32, 32)
    loss = LPIPSLoss(loss_weight=0.5, net="alex")
    assert loss(pred, target).item() == pytest.approx(0.5 * 2 * (pred - target).abs().mean().item(), rel=1e-5)
    assert loss.net.net == "alex"
    assert [torch.equal(seen, 2 * x - 1) for seen, x in zip(loss.net.seen, (pred, target), strict=True)] == [True] * 2
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.parametrize("cls", [FFTLoss, SSIMLoss])
def test_losses_are_computed_in_float32_and_train(cls: Any) -> None:
    pred, target = (x.bfloat16() for x in images(1, 3, 16, 16))
    expected = cls()(pred.float(), target.float())
    pred = pred.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cls()(pred, target)
    assert (loss.dtype, loss.shape, loss.item()) == (torch.float32, (), expected.item())
    assert cls.reduction == "mean"
    loss.backward()
    with torch.no_grad():
        assert cls()(pred - 1e-2 * pred.grad.sign(), target) < loss


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_images_that_are_too_small(lpips_stub: None) -> None:
    with pytest.raises(
        UserError, match=r"SSIMLoss needs images of at least 11 pixels .*these are 20 x 10\. Raise .*gt_s"
    ):
        SSIMLoss()(*images(1, 3, 10, 20))
    with pytest.raises(UserError, match="LPIPSLoss needs images of at least 16 pixels"):
        LPIPSLoss()(*images(1, 3, 15, 15))


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="reduction is 'none'; FFTLoss takes mean or sum"):
        FFTLoss(reduction="none")
    with pytest.raises(ValueError, match="norm is 'orth'; FFTLoss takes backward, ortho, forward"):
        FFTLoss(norm="orth")
    with pytest.raises(ValueError, match="net is 'vgg19'; LPIPSLoss takes alex, vgg, squeeze"):
        LPIPSLoss(net="vgg19")


def test_lpips_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        UserError, match=r'needs the package lpips: pip install "esc-arch\[lpips\]", or leave this loss'
    ):
        LPIPSLoss()


@pytest.mark.parametrize(
    ("net", "file"),
    [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("squeeze", "squeezenet1_1-")],
)
def test_lpips_whose_backbone_cannot_be_downloaded(
    net: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(**_: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=no_network))
    with pytest.raises(UserError, match=rf"no route.*Get the file {file}.*put it in {tmp_path}/hub/checkpoints\."):
        LPIPSLoss(net=net)


# --- option files -----------------------------------------------------------------------------------------------------


def test_losses_of_a_training(train_options: Any, make_model: Any) -> None:
    section = {"freq": {"type": "FFTLoss", "loss_weight": 0.05}, "edges": {"type": "CharbonnierLoss"}}
    losses = make_model(train=train_options["train"] | {"losses": section}).losses
    assert [(name, type(loss).__name__) for name, loss in losses.items()] == [
        ("freq", "FFTLoss"), ("edges", "CharbonnierLoss")
    ]  # fmt: skip
    assert losses["freq"].loss_weight == 0.05
    assert section["freq"]["type"] == "FFTLoss"
    assert make_model().losses == {}
    assert type(build_loss({"type": "SSIMLoss"})) is SSIMLoss


def test_a_training_with_losses_alone(train_options: Any, run_basicsr: Any) -> None:
    train_options["train"] |= {"losses": {"freq": FFT, "ssim": {"type": "SSIMLoss"}}, "pixel_opt": None}
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert re.search(r"l_freq: \d.*l_ssim: \d", run.log())
    assert "l_pix" not in run.log()


def problems(opt: Any, model_type: str = "ESCModel", **changes: Any) -> list[str]:
    train = {key: value for key, value in (opt["train"] | changes).items() if value is not ...}
    return list(map(str, check_options(opt | {"model_type": model_type, "train": train}, True)))


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": {"fft": FFT, "ssim": {"type": "SSIMLoss"}, "l1": {"type": "L1Loss", "reduction": "sum"}}},
        {"losses": {"fft": FFT}, "pixel_opt": ...},
        {"pixel_opt": FFT},
        {"losses": {}},
        {"losses": None},
    ],
)
def test_valid_options(changes: Any, train_options: Any) -> None:
    assert problems(train_options, **changes) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [FFT]}, "train:losses: .* given; must be a mapping of .*, such as fft: {type: FFTLoss"),
        ({"losses": {"a b": FFT}}, "train:losses:a b: cannot be the name of a loss; must consist of letters"),
        ({"losses": {"pix": FFT}}, "train:losses:pix: cannot be .* none of pix, percep, style, which the log has"),
        ({"losses": {"x": 1}}, "train:losses:x: 1 given; must be a mapping with type"),
        ({"losses": {"x": {"type": "FTLoss"}}}, "train:losses:x:type: 'FTLoss' .* Did you mean 'FFTLoss'.* SSIMLoss"),
        ({"losses": {"x": FFT | {"weight": 1}}}, "train:losses:x:weight: FFTLoss has no such argument"),
        ({"losses": {"x": FFT | {"norm": "l2"}}}, "train:losses:x: norm is 'l2'; FFTLoss takes backward"),
        ({"pixel_opt": FFT | {"norm": "l2"}}, "train:pixel_opt: norm is 'l2'; FFTLoss takes backward"),
        ({"losses": {"x": {"type": "L1Loss", "reduction": "none"}}}, "x:reduction: 'none' given; must be mean or sum"),
        (
            {"losses": {"x": {"type": "PerceptualLoss"}}},
            "train:losses:x:type: PerceptualLoss is not computed from an image and its target.*perceptual_opt.*SSIM",
        ),
        ({"losses": {"x": {"type": "LPIPSLoss", "net": "a"}}}, "train:losses:x: net is 'a'; LPIPSLoss takes alex, vgg"),
        ({"losses": {}, "pixel_opt": ...}, "train: has no loss; give one of pixel_opt and perceptual_opt, or losses"),
    ],
)
def test_invalid_options(changes: Any, message: str, train_options: Any, lpips_stub: None) -> None:
    (problem,) = problems(train_options, **changes)
    assert re.search(message, problem)


def test_lpips_is_missed_before_the_run(train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (problem,) = problems(train_options, losses={"lpips": {"type": "LPIPSLoss"}})
    assert 'train:losses:lpips: LPIPSLoss needs the package lpips: pip install "esc-arch[lpips]"' in problem


def test_losses_of_images_and_single_pixels(train_options: Any) -> None:
    found = problems(train_options, "ESCLTEModel", losses={"fft": FFT, "l1": {"type": "L1Loss"}})
    expected = "train:losses:fft:type: FFTLoss compares images; ESCLTEModel trains on single pixels: use L1Loss"
    assert [problem for problem in found if ":losses:" in problem] == [expected]


OWN = {"losses": {"fft": FFT}, "freeze": ["proj.*"], "lr_factors": {"proj.*": 2}}


@pytest.mark.parametrize("key", OWN)
def test_models_that_would_not_use_it(key: str, train_options: Any) -> None:
    assert f"train:{key}: SRModel does not use it; ESCModel does. Change model_type, or remove it" in problems(
        train_options, "SRModel", **{key: OWN[key]}
    )


def test_a_gan_freezes_but_has_basicsr_s_losses(train_options: Any) -> None:
    found = [problem for problem in problems(train_options, "ESCRealGANModel", **OWN) if problem.startswith("train:l")]
    assert len(found) == 1
    assert found[0].startswith("train:losses: {'fft': ")
    assert "given; ESCRealGANModel, whose step is BasicSR's, does not have it. Remove it" in found[0]
