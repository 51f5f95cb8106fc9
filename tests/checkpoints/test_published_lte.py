"""The published ESC-LTE's files wherever checkpoints load: the published outputs, and never the other network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import esc_arch
from esc_arch import ESCLTE, UserError
from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights
from esc_arch.cli import main
from esc_arch.data.arbitrary_scale_dataset import ArbitraryScaleDataset

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "esc_lte_official.safetensors")
OPTIONS = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["esc_lte_official"]["options"]
TOLERANCE = 1e-4
CONTENTS = ("as published", "bare", "bare, of several processes")


def published(path: Path, form: str = CONTENTS[0]) -> Path:
    weights = {name.removeprefix("weights."): tensor for name, tensor in TENSORS.items() if name.startswith("weights.")}
    content: dict[str, Any] = weights
    if form == CONTENTS[0]:
        args = {"encoder_spec": {"name": "esc", "args": {"dim": 16}}, "hidden_dim": 32}
        content = {"model": {"name": "lte", "args": args, "sd": weights}, "epoch": 1000, "optimizer": {"name": "adam"}}
    elif form == CONTENTS[2]:
        content = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save(content, path)
    return path


def small(**changes: Any) -> ESCLTE:
    return ESCLTE(**OPTIONS | changes).eval()


@torch.no_grad()
def check_outputs(net: torch.nn.Module) -> None:
    for scale in (2, 2.5, 6):
        expected = TENSORS[f"output.x{scale}"]
        assert (net(TENSORS["input"], scale) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("form", CONTENTS)
def test_a_file_alone_is_enough(form: str, tmp_path: Path) -> None:
    upscaler = esc_arch.load(published(tmp_path / "lte.pth", form), device="cpu")
    assert {key: upscaler.network_g[key] for key in OPTIONS} == OPTIONS
    assert upscaler.network_g["type"] == "ESCLTE"
    check_outputs(upscaler.net)


def test_converted_it_stays_what_it_is(tmp_path: Path) -> None:
    path = published(tmp_path / "lte.pth")
    for suffix in (".safetensors", ".pth"):
        made = tmp_path / f"made{suffix}"
        assert main(["convert", str(path), "-o", str(made)]) == 0
        path = made
        weights = select_weights(read_checkpoint(made), "params", made)
        assert weights.keys() == small().state_dict().keys()
        check_outputs(esc_arch.load(made, device="cpu").net)


def test_a_training_starts_from_it_and_saves_what_loads_again(
    make_model: Any, train_options: Any, tmp_path: Path
) -> None:
    path = {"pretrain_network_g": str(published(tmp_path / "lte.pth")), "param_key_g": "params_ema"}
    model = make_model(path, model_type="ESCLTEModel", network_g={"type": "ESCLTE", **OPTIONS})
    check_outputs(model.net_g_ema)
    model.save_network(model.net_g, "net_g", 5)
    saved = tmp_path / "models" / "net_g_5.pth"
    check_outputs(esc_arch.load(saved, device="cpu").net)


def own_weights(normalize: bool) -> dict[str, Tensor]:
    return dict(small(normalize=normalize).state_dict())


@pytest.mark.parametrize("source", ["published", "own, normalized", "own"])
def test_it_never_becomes_the_other_network_in_silence(source: str, tmp_path: Path, basicsr_log: Any) -> None:
    if source == "published":
        weights = select_weights(read_checkpoint(published(tmp_path / "lte.pth")), "model", "lte.pth")
        basicsr_log.clear()
    else:
        weights = own_weights(source == "own, normalized")
    normalized = source != "own"
    other = small(normalize=not normalized)
    said = (
        f"the checkpoint is ESCLTE with normalize: {normalized}, the network ESCLTE with normalize: {not normalized}; "
    )
    for strict in (True, False):
        with pytest.raises(UserError, match=f"lte.pth does not fit ESCLTE: {said}") as caught:
            load_weights(other, weights, strict=strict, source="lte.pth")
        assert str(caught.value).endswith(f"give network_g: normalize: {str(normalized).lower()}.")
    with pytest.raises(RuntimeError, match=r"image_mean_std|proj\.weight"):
        other.load_state_dict(weights)
    load_weights(small(normalize=normalized), weights, strict=True, source="lte.pth")
    assert not basicsr_log.messages


def test_sets_at_fixed_scales_by_an_option_file(run_basicsr: Any, test_options: Any, photographs: Any) -> None:
    """What the published test configurations do, one for each scale."""
    opt = test_options
    del opt["scale"]
    opt["model_type"], opt["network_g"] = "ESCLTEModel", {"type": "ESCLTE", **OPTIONS}
    opt["path"] = {"pretrain_network_g": str(published(run_basicsr.folder / "lte.pth")), "strict_load_g": True}
    dataset = {"type": "ArbitraryScaleDataset", "dataroot_gt": str(photographs.val_gt)}
    opt["datasets"] = {f"test_x{s}": {**dataset, "name": f"Cuts_x{s}", "scale": s} for s in (2, 2.5, 6)}
    for metric in opt["val"]["metrics"].values():
        metric["crop_border"] = "scale"
    run = run_basicsr("test", opt)
    assert run.status == 0, run.err
    model = esc_arch.load("lte.pth", device="cpu")
    for options in opt["datasets"].values():
        images = ArbitraryScaleDataset({**options, "phase": "test", "io_backend": {"type": "disk"}})
        for item in (images[index] for index in range(2)):
            picture = f"visualization/{options['name']}/{Path(item['gt_path']).stem}_trial.png"
            found = cv2.imread(str(run.folder / "results" / "trial" / picture))[..., ::-1]
            expected = model(item["lq"][None], options["scale"])[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
            assert np.abs(found - expected).max() < 0.51
