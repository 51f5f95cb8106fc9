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

from esc_arch.options import CheckScope
from esc_arch.options.checks import check_options
from esc_arch.options.key_checks import check_values, unknown_keys


def change(options: Any, path: str, value: Any) -> Any:
    changed = section = copy.deepcopy(options)
    *sections, key = path.split(":")
    for name in sections:
        section = section[name]
    section[key] = value
    return changed


def test_nothing_is_said_about_sound_options(train_options: Any, test_options: Any) -> None:
    for opt, is_train in ((train_options, True), (test_options, False)):
        assert list(unknown_keys(opt, is_train)) == list(check_values(opt, is_train)) == []


ERRORS = {
    "scael": "scael: not known, BasicSR and ESCModel do not read it. Did you mean 'scale'?",
    "trian": "trian: not known, .* Did you mean 'train'?",
    "Scale": "Scale: not known, .* Did you mean 'scale'?",
    "path:pretrain_netwrok_g": "path:pretrain_netwrok_g: not known, .* Did you mean 'pretrain_network_g'?",
    "path:strict_load_": "path:strict_load_: not known, .* Did you mean 'strict_load_[dg]'?",
    "train:total_iters": "train:total_iters: not known, .* Did you mean 'total_iter'?",
    "train:ema_decy": "train:ema_decy: not known, .* Did you mean 'ema_decay'?",
    "train:gradient_clipp": "train:gradient_clipp: not known, .* Did you mean 'gradient_clip'?",
    "train:pixel_op": "train:pixel_op: not known, .* Did you mean 'pixel_opt'?",
    "val:save_imgs": "val:save_imgs: not known, .* Did you mean 'save_img'?",
    "val:comparision": "val:comparision: not known, .* Did you mean 'comparison'?",
    "logger:print_freqs": "logger:print_freqs: not known, .* Did you mean 'print_freq'?",
    "datasets:train:use_hflips": "datasets:train:use_hflips: not known, BasicSR and PairedImageDataset do not read it. "
    "Did you mean 'use_hflip'?",
    "datasets:val:filename_tmp": "datasets:val:filename_tmp: not known, .* Did you mean 'filename_tmpl'?",
    "datasets:train:batch_size": "datasets:train:batch_size: BasicSR and .* Did you mean 'batch_size_per_gpu'?",
}


@pytest.mark.parametrize("path", ERRORS)
def test_mistyped_keys(path: str, train_options: Any) -> None:
    (found,) = unknown_keys(change(train_options, path, 1), True)
    assert re.fullmatch(ERRORS[path].replace("?", r"\?"), found.problem)
    assert found.is_error == (path != "datasets:train:batch_size")
    (found,) = unknown_keys(change(train_options, path, None), True)
    assert not found.is_error  # which asks for nothing


@pytest.mark.parametrize(
    ("path", "warning"),
    [
        ("my_note", "my_note: BasicSR and ESCModel do not read it"),
        ("l1_gt_usm", "l1_gt_usm: has no effect: BasicSR and ESCModel do not read it, only other types do"),
        ("path:zzz", "path:zzz: BasicSR and ESCModel do not read it"),
        ("path:strict_load", "path:strict_load: has no effect: in BasicSR 1.4.2 its name is 'strict_load_g'"),
        ("train:tsa_iter", "train:tsa_iter: has no effect: BasicSR and ESCModel do not read it, only other types do"),
        ("datasets:val:num_frame", "datasets:val:num_frame: has no effect: BasicSR and PairedImageDataset .*"),
        ("logger:colour", "logger:colour: BasicSR and ESCModel do not read it"),
    ],
)
def test_keys_without_effect(path: str, warning: str, train_options: Any) -> None:
    (found,) = unknown_keys(change(train_options, path, 1), True)
    assert re.fullmatch(warning, found.problem) and not found.is_error


def test_keys_of_wandb(train_options: Any) -> None:
    (found,) = unknown_keys(change(train_options, "logger:wandb", {"projekt": "x"}), True)
    assert (
        found.problem == "logger:wandb:projekt: not known, nothing reads it. Did you mean 'project'?" and found.is_error
    )


@pytest.mark.parametrize("path", ["use_tb_logger", "network_x", "datasets:train:use_shuffle", "train:optim_x"])
def test_keys_that_are_known_to_be_idle(path: str, train_options: Any) -> None:
    assert list(unknown_keys(change(train_options, path, {}), True)) == []


def test_a_test_does_not_look_at_the_training(test_options: Any) -> None:
    test_options |= {"train": {"total_iters": 3}, "logger": {"print_freqs": 1}}
    assert list(unknown_keys(test_options, False)) == []


def test_without_a_known_type_nothing_can_be_said(train_options: Any) -> None:
    train_options |= {"model_type": "ESCModl", "scael": 1}
    train_options["datasets"]["val"] |= {"type": "Paired", "dataroot_gtt": 1}
    assert list(unknown_keys(train_options, True)) == []


class OtherModel(SRModel):
    """Of another package, with keys of its own that look like mistyped ones."""

    def __init__(self, opt: Any) -> None:
        super().__init__(opt)
        self.tile = opt["tile"]["tile_size"]
        self.scales = opt.get("scales")
        train_opt = self.opt["train"]
        self.total = train_opt.get("total_iters")
        self.file = self.opt["path"]["pretrain_netwok_g"]


class OtherDataset(Dataset):  # type: ignore[type-arg]
    def __init__(self, opt: Any) -> None:
        self.sizes = opt["gt_sizes"], opt.dataroot_gts


class OpenDataset(Dataset):  # type: ignore[type-arg]
    def __init__(self, opt: Any) -> None:
        vars(self).update(**opt)


@pytest.fixture
def others() -> Iterator[None]:
    MODEL_REGISTRY.register(OtherModel)
    DATASET_REGISTRY.register(OtherDataset)
    DATASET_REGISTRY.register(OpenDataset)
    yield
    del MODEL_REGISTRY._obj_map["OtherModel"]
    del DATASET_REGISTRY._obj_map["OtherDataset"], DATASET_REGISTRY._obj_map["OpenDataset"]


def test_what_other_packages_read_is_known(train_options: Any, others: None) -> None:
    train_options |= {"model_type": "OtherModel", "tile": {"tile_size": 3}, "scales": [2]}
    train_options["train"]["total_iters"] = 5
    train_options["path"]["pretrain_netwok_g"] = "x"
    train_options["datasets"]["val"] = {"type": "OtherDataset", "gt_sizes": 1}
    train_options["datasets"]["val_2"] = {"type": "OpenDataset", "gt_sise": 1}
    assert list(unknown_keys(train_options, True)) == []
    train_options["train"]["total_it" + "ter"] = 5  # which may not stand here as a word
    (found,) = unknown_keys(train_options, True)
    assert found.is_error and "BasicSR and OtherModel do not read it. Did you mean 'total_iter" in found.problem


def test_what_may_be_read_is_no_error(train_options: Any, others: None) -> None:
    """A word in the source, though not seen to be a key."""
    train_options["datasets"]["val"] = {"type": "OtherDataset", "dataroot_gts": 1}
    (found,) = unknown_keys(train_options, True)
    assert found.problem.startswith("datasets:val:dataroot_gts: BasicSR and OtherDataset do not read it, as far as its")
    assert not found.is_error


VALUES = [
    ("train:ema_decay", 1.5, "train:ema_decay: 1.5 given; must be a number from 0 (no average) to 1, such as 0.999"),
    ("train:ema_decay", "0.9", "train:ema_decay: '0.9' given; must be a number from 0"),
    ("train:warmup_iter", "5e3", "train:warmup_iter: '5e3' given; must be a whole number of iterations"),
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
    ("datasets:train:dataset_enlarge_ratio", 0, "datasets:train:dataset_enlarge_ratio: 0 given; must be a positive"),
    ("datasets:train:mean", [1, "x"], "datasets:train:mean: [1, 'x'] given; must be a list of numbers"),
    ("datasets:val:name", 5, "datasets:val:name: 5 given; must be text, in quotes if it looks like a number"),
    ("datasets:val:scale", [1, 2, 3], "datasets:val:scale: [1, 2, 3] given; must be a number of at least 1, or two"),
    ("val:suffix", False, "val:suffix: False given; must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), VALUES)
def test_wrong_values(path: str, value: Any, message: str, train_options: Any) -> None:
    (problem,) = check_values(change(train_options, path, value), True)
    assert problem.startswith(message)
    assert list(check_values(change(train_options, path, None), True)) == []


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
    assert list(check_values(change(train_options, path, value), True)) == []


def test_values_of_other_packages_are_theirs(train_options: Any, others: None) -> None:
    train_options["datasets"]["val"] = {"type": "OtherDataset", "gt_size": [3, 4], "mean": "of ImageNet"}
    train_options |= {"model_type": "OtherModel", "queue_size": "large"}
    assert list(check_values(train_options, True)) == []


def test_without_files_nothing_is_looked_for(train_options: Any) -> None:
    for dataset in train_options["datasets"].values():
        dataset |= {"dataroot_gt": "nowhere", "dataroot_lq": "nowhere", "meta_info_file": "no.txt"}
    train_options["path"] |= {"pretrain_network_g": "no.pth", "resume_state": "no.state"}
    train_options["num_gpu"] = 64
    assert len(check_options(train_options, True)) >= 6
    assert check_options(train_options, True, CheckScope(with_files=False)) == []
    train_options["datasets"]["train"]["gt_size"] = 15
    (problem,) = check_options(train_options, True, CheckScope(with_files=False))
    assert problem.startswith("datasets:train:gt_size: 15 given; must be divisible by scale")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "val:metrics:psnr:crop_border: None given; must be a whole number from 0 to 1000, such as 4"),
        (-1, "val:metrics:psnr:crop_border: -1 given; must be a whole number"),
        (10**30, "val:metrics:psnr:crop_border: 1000000000000000000000000000000 given; must be a whole number"),
        ("scale", "val:metrics:psnr:crop_border: 'scale' given, which only ESCLTEModel knows"),
    ],
)
def test_values_of_metrics(train_options: Any, value: Any, message: str) -> None:
    train_options["val"]["metrics"]["psnr"]["crop_border"] = value
    (problem,) = check_values(train_options, True)
    assert problem.startswith(message)


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
    assert list(check_values(train_options, True)) == [message]
    train_options["train"]["losses"] = {"fft": {"type": "FFTLoss", "loss_weight": "1"}}
    assert "train:losses:fft:loss_weight: '1' given" in " ".join(check_values(train_options, True))
