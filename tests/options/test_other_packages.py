"""Classes of another package that have names of ours: what is known of ours is not held against them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from basicsr.utils import registry
from other_packages import write_project

import esc_arch
from esc_arch.options import inspect_options
from esc_arch.problems import of_severity

REGISTRIES = ("ARCH", "MODEL", "DATASET", "LOSS")


@pytest.fixture
def hat(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other package, imported after esc_arch."""
    registries = [getattr(registry, f"{kind}_REGISTRY") for kind in REGISTRIES]
    for each in registries:
        monkeypatch.setattr(each, "_obj_map", dict(each._obj_map))
    write_project(work_folder)
    monkeypatch.syspath_prepend(work_folder)
    modules = [f"hat.{name}" for name in ("archs", "models", "data", "losses")]
    with pytest.warns(UserWarning, match="registry is hat"):
        for name in modules:
            __import__(name)
    yield
    for name in ["hat", *modules]:
        del sys.modules[name]


def messages(opt: Any, run_basicsr: Any, is_train: bool = True) -> list[str]:
    inspection = inspect_options(run_basicsr.option_file(opt), root_path=".", is_train=is_train)
    return [f"{problem.path}: {problem.message}" for problem in inspection.problems if problem.severity != "note"]


@pytest.mark.usefixtures("hat")
def test_their_options_are_theirs(run_basicsr: Any, train_options: Any) -> None:
    train_options |= {"model_type": "ESRModel", "network_g": {"type": "ESC", "upscale": 2}}
    train_options["datasets"]["train"] |= {"type": "DownsampleImageDataset", "round_lq": "a word of theirs"}
    train_options["train"] |= {
        "losses": "theirs",
        "freeze": 5,
        "pixel_opt": {"type": "SSIMLoss", "loss_weight": 0.5, "levels": 2},
    }
    train_options["val"] |= {"protocol": "theirs", "tb_images": 2}
    assert messages(train_options, run_basicsr) == []


@pytest.mark.usefixtures("hat")
def test_ours_are_known_by_names_of_their_own(run_basicsr: Any, train_options: Any, photographs: Any) -> None:
    """And checked and used as ever."""
    data = {"type": "esc_arch.DownsampleImageDataset", "dataroot_gt": str(photographs.gt), "round_lq": True}
    train = train_options["datasets"]["train"]
    train_options["datasets"]["train"] = {
        key: value for key, value in train.items() if key not in ("dataroot_lq", "filename_tmpl")
    } | data
    train_options["model_type"] = "esc_arch.ESRModel"
    train_options["network_g"]["type"] = "esc_arch.ESC"
    train_options["train"]["losses"] = {"ssim": {"type": "esc_arch.SSIMLoss", "loss_weight": 0.1}}
    train_options["val"] |= {"protocol": "srmodel", "val_freq": 4}
    assert messages(train_options, run_basicsr) == []
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert "Network [ESC] is created" in run.log()
    assert "blocks.0.attn.to_qkv.weight" in run.weights()
    wrong = copy.deepcopy(train_options)
    wrong["datasets"]["train"] |= {"round_lq": "maybe", "gt_size": 15}
    wrong["network_g"]["n_block"] = 1
    wrong["train"]["losses"]["ssim"]["windo"] = 3
    wrong["val"]["protocol"] = "publishd"
    assert {text.partition(": ")[0] for text in messages(wrong, run_basicsr)} == {
        "datasets:train:round_lq",
        "datasets:train:gt_size",
        "network_g:n_block",
        "train:losses:ssim:windo",
        "val:protocol",
    }


@pytest.mark.usefixtures("hat")
def test_the_names_that_are_offered(run_basicsr: Any, train_options: Any) -> None:
    """Each class once, ours by its own name where the short one is another's."""
    train_options["network_g"]["type"] = "Nothing"
    (text,) = messages(train_options, run_basicsr)
    names = text.partition("Allowed: ")[2].partition(". If it is")[0].split(", ")
    assert {"ESC", "esc_arch.ESC", "ESCFP", "ESCFP_project", "HAT"} <= set(names)
    assert "esc_arch.ESCFP" not in names and len(set(names)) == len(names)


def test_arbitrary_scales_by_the_other_name(run_basicsr: Any, train_options: Any, photographs: Any) -> None:
    """Its data sets have scales of their own, which the file's does not replace."""
    section = {"type": "esc_arch.ArbitraryScaleDataset", "dataroot_gt": str(photographs.val_gt), "scale": 2.5}
    opt = {
        "name": "trial",
        "model_type": "esc_arch.ESCLTEModel",
        "scale": 4,
        "num_gpu": 0,
        "network_g": {**train_options["network_g"], "type": "esc_arch.ESCLTE", "hidden_dim": 8, "mlp_dims": [8]},
        "datasets": {"test_1": {"name": "Cuts", **section}},
        "val": {"metrics": {"psnr": {"type": "calculate_psnr", "crop_border": "scale", "test_y_channel": True}}},
    }
    del opt["network_g"]["upscaling_factor"]
    inspection = inspect_options(run_basicsr.option_file(opt), root_path=".", is_train=False)
    assert of_severity(inspection.problems, "error") == []
    assert inspection.opt["datasets"]["test_1"]["scale"] == 2.5
    assert esc_arch.ESCLTE is registry.ARCH_REGISTRY.get("esc_arch.ESCLTE")


@pytest.mark.usefixtures("hat")
def test_whose_class_it_is_that_has_no_such_argument(run_basicsr: Any, train_options: Any) -> None:
    """`type: ESC` meant ours, and is theirs."""
    train_options["network_g"] |= {"n_blokcs": 1}
    assert any(": ESC of hat.archs has no such argument" in text for text in messages(train_options, run_basicsr))
    train_options["network_g"]["type"] = "esc_arch.ESC"
    assert any(": esc_arch.ESC has no such argument" in text for text in messages(train_options, run_basicsr))


@pytest.mark.usefixtures("hat")
def test_networks_are_checked_beside_other_mistakes(run_basicsr: Any, train_options: Any) -> None:
    train_options["network_g"] |= {"type": "esc_arch.ESC", "num_heads": 3}
    train_options["num_gpu"] = 7
    found = {text.partition(": ")[0] for text in messages(train_options, run_basicsr)}
    assert found == {"num_gpu", "network_g"}
