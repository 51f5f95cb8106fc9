"""Keys that nothing reads, and values of a wrong type."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from torch.utils.data import Dataset

from esc_arch.options import CheckScope, check_options
from esc_arch.options.section_checks import check_keys
from esc_arch.problems import Problem


def change(options: Any, path: str, value: Any) -> Any:
    changed = section = copy.deepcopy(options)
    *sections, key = path.split(":")
    for name in sections:
        section = section[name]
    section[key] = value
    return changed


def check(options: Any, is_train: bool = True) -> list[Problem]:
    return list(check_keys(options, is_train))


def test_nothing_is_said_about_sound_options(train_options: Any, test_options: Any) -> None:
    assert check(train_options) == check(test_options, False) == []


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("scael", "scale"),
        ("trian", "train"),
        ("Scale", "scale"),
        ("path:pretrain_netwrok_g", "pretrain_network_g"),
        ("path:strict_load_", "strict_load_[dg]"),
        ("train:total_iters", "total_iter"),
        ("train:ema_decy", "ema_decay"),
        ("train:gradient_clipp", "gradient_clip"),
        ("train:pixel_op", "pixel_opt"),
        ("val:save_imgs", "save_img"),
        ("val:comparision", "comparison"),
        ("logger:print_freqs", "print_freq"),
        ("datasets:train:use_hflips", "use_hflip"),
        ("datasets:val:filename_tmp", "filename_tmpl"),
    ],
)
def test_mistyped_keys(path: str, meant: str, train_options: Any) -> None:
    (found,) = check(change(train_options, path, 1))
    assert found.path == path and found.severity == "error"
    assert re.fullmatch(rf"unknown key\. Did you mean '{meant}'\?", found.message)
    (found,) = check(change(train_options, path, None))
    assert found.severity == "warning"  # which asks for nothing


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_note", "unknown key; it will be ignored"),
        ("path:zzz", "unknown key; it will be ignored"),
        ("logger:colour", "unknown key; it will be ignored"),
        ("datasets:train:batch_size", "unknown key; it will be ignored. Did you mean 'batch_size_per_gpu'?"),
        ("path:strict_load", "will be ignored: in BasicSR 1.4.2 its name is 'strict_load_g'"),
    ],
)
def test_keys_without_effect(path: str, message: str, train_options: Any) -> None:
    assert check(change(train_options, path, 1)) == [Problem(path, message, "warning")]


def test_keys_of_wandb(train_options: Any) -> None:
    (found,) = check(change(train_options, "logger:wandb", {"projekt": "x", "project": "y"}))
    assert str(found) == "logger:wandb:projekt: unknown key. Did you mean 'project'?" and found.severity == "error"


@pytest.mark.parametrize("path", ["use_tb_logger", "network_x", "datasets:train:use_shuffle", "train:optim_x"])
def test_keys_that_are_known_to_be_idle(path: str, train_options: Any) -> None:
    assert check(change(train_options, path, {})) == []


@pytest.mark.parametrize(("name", "severity"), [("amp", "warning"), ("losses", "error")])
def test_options_of_esc_model_with_another_model(name: str, severity: Any, train_options: Any) -> None:
    train_options["model_type"] = "SRModel"
    train_options["train"][name] = {"amp": "bf16", "losses": {"fft": {"type": "FFTLoss"}}}[name]
    message = "SRModel does not use it; ESCModel does. Change model_type, or remove it"
    assert check(train_options) == [Problem(f"train:{name}", message, severity)]


def test_a_test_does_not_look_at_the_training(test_options: Any) -> None:
    test_options |= {"train": {"total_iters": 3}, "logger": {"print_freqs": 1}}
    assert check(test_options, False) == []


class OtherModel(SRModel):
    """Of another package, with keys of its own, some of which look like mistyped ones."""


class OtherDataset(Dataset):  # type: ignore[type-arg]
    pass


@pytest.fixture
def others() -> Iterator[None]:
    MODEL_REGISTRY.register(OtherModel)
    DATASET_REGISTRY.register(OtherDataset)
    yield
    del MODEL_REGISTRY._obj_map["OtherModel"], DATASET_REGISTRY._obj_map["OtherDataset"]


def test_keys_of_other_packages(train_options: Any, others: None) -> None:
    """What they read is not known: a key that looks mistyped is a warning, any other is left alone."""
    train_options |= {"model_type": "OtherModel", "tile": {"tile_size": 3}, "scales": [2]}
    train_options["train"]["total_iters"] = 5
    train_options["datasets"]["val"] = {"type": "OtherDataset", "gt_sizes": 1, "anything": 2}
    found = check(train_options)
    assert {problem.path for problem in found} == {"scales", "train:total_iters", "datasets:val:gt_sizes"}
    assert {problem.severity for problem in found} == {"warning"}


VALUES = [
    ("train:ema_decay", 1.5, "train:ema_decay: 1.5 given; must be a number from 0 to 1, such as 0.999"),
    ("train:ema_decay", "0.9", "train:ema_decay: '0.9' given; must be a number from 0"),
    ("train:warmup_iter", "5e3", "train:warmup_iter: '5e3' given; must be a whole number of at least -1"),
    ("train:warmup_iter", -2, "train:warmup_iter: -2 given"),
    ("val:save_img", "false", "val:save_img: 'false' given; must be true or false, without quotes"),
    ("path:strict_load_g", "no", "path:strict_load_g: 'no' given; must be true or false"),
    ("path:param_key_d", 3, "path:param_key_d: 3 given; must be text"),
    ("path:experiments_root", ["x"], "path:experiments_root: ['x'] given; must be text"),
    ("scale", "2", "scale: '2' given; must be a number of at least 1, such as 4"),
    ("scale", 0, "scale: 0 given"),
    ("network_d", [1], "network_d: [1] given; must be a mapping"),
    ("queue_size", -1, "queue_size: -1 given; must be a whole number of at least 0"),
    ("logger:use_tb_logger", "on", "logger:use_tb_logger: 'on' given; must be true or false"),
    ("datasets:train:use_rot", "true", "datasets:train:use_rot: 'true' given; must be true or false"),
    ("datasets:train:pin_memory", 2, "datasets:train:pin_memory: 2 given; must be true or false"),
    ("datasets:train:dataset_enlarge_ratio", 0, "datasets:train:dataset_enlarge_ratio: 0 given; must be a number"),
    ("datasets:train:mean", [1, "x"], "datasets:train:mean: [1, 'x'] given; must be a list of numbers"),
    ("datasets:val:name", 5, "datasets:val:name: 5 given; must be text on one line, in quotes"),
    ("datasets:val:scale", [1, 2, 3], "datasets:val:scale: [1, 2, 3] given; must be a number or a list of 2 numbers"),
    ("val:suffix", False, "val:suffix: False given; must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), VALUES)
def test_wrong_values(path: str, value: Any, message: str, train_options: Any) -> None:
    (problem,) = check(change(train_options, path, value))
    assert str(problem).startswith(message) and problem.severity == "error"
    assert check(change(train_options, path, None)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train:warmup_iter", 2e4),
        ("train:ema_decay", 0),
        ("val:save_img", 1),
        ("datasets:train:dataset_enlarge_ratio", 0.5),
        ("path:ignore_resume_networks", ["network_d"]),
        ("scale", 2.5),
    ],
)
def test_values_that_work(path: str, value: Any, train_options: Any) -> None:
    assert check(change(train_options, path, value)) == []


def test_values_of_other_packages_are_theirs(train_options: Any, others: None) -> None:
    train_options["datasets"]["val"] = {"type": "OtherDataset", "gt_size": [3, 4], "mean": "of ImageNet"}
    train_options |= {"model_type": "OtherModel", "queue_size": "large"}
    assert check(train_options) == []


def test_without_files_nothing_is_looked_for(train_options: Any) -> None:
    for dataset in train_options["datasets"].values():
        dataset |= {"dataroot_gt": "nowhere", "dataroot_lq": "nowhere", "meta_info_file": "no.txt"}
    train_options["path"] |= {"pretrain_network_g": "no.pth", "resume_state": "no.state"}
    train_options["num_gpu"] = 64
    assert len(check_options(train_options, True)) >= 6
    assert check_options(train_options, True, CheckScope(with_files=False)) == []
    train_options["datasets"]["train"]["gt_size"] = 15
    (problem,) = check_options(train_options, True, CheckScope(with_files=False))
    assert str(problem).startswith("datasets:train:gt_size: 15 given; must be divisible by scale")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "val:metrics:psnr:crop_border: None given; must be a whole number or scale from 0 to 1000"),
        (-1, "val:metrics:psnr:crop_border: -1 given; must be a whole number"),
        (10**30, "val:metrics:psnr:crop_border: 1000000000000000000000000000000 given; must be a whole number"),
        ("scale", "val:metrics:psnr:crop_border: 'scale' given, which only ESCLTEModel knows"),
    ],
)
def test_values_of_metrics(train_options: Any, value: Any, message: str) -> None:
    train_options["val"]["metrics"]["psnr"]["crop_border"] = value
    assert str(check_options(train_options, True)[-1]).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("reduction", None, "train:pixel_opt:reduction: None given; must be mean or sum"),
        ("reduction", "none", "train:pixel_opt:reduction: 'none' given; must be mean or sum"),
        ("loss_weight", None, "train:pixel_opt:loss_weight: None given; must be a number, such as 1.0"),
    ],
)
def test_values_of_losses(train_options: Any, key: str, value: Any, message: str) -> None:
    train_options["train"]["pixel_opt"][key] = value
    assert [str(problem) for problem in check_options(train_options, True)] == [message]
    train_options["train"]["losses"] = {"fft": {"type": "FFTLoss", "loss_weight": "1"}}
    assert "train:losses:fft:loss_weight: '1' given" in " ".join(map(str, check_options(train_options, True)))
