"""Option files for a network that is published: one to test it, one to train it further."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from esc_arch.archs.base import network_named
from esc_arch.options import Options

__all__ = ["option_files"]

BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
#: Scales that networks of any scale are tested at.
SCALES = (2, 3, 4)
DISK = {"type": "disk"}
TRAINING: Options = {
    "ema_decay": 0.999,
    "optim_g": {"type": "AdamW", "lr": 5e-5, "weight_decay": 0, "betas": [0.9, 0.9]},
    "scheduler": {"type": "MultiStepLR", "milestones": [50000, 80000, 90000, 95000], "gamma": 0.5},
    "total_iter": 100000,
    "warmup_iter": -1,
    "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
}
LOADING: Options = {"num_worker_per_gpu": 4, "batch_size_per_gpu": 16, "dataset_enlarge_ratio": 100}
LOADING |= {"prefetch_mode": None, "pin_memory": True}

CHOICE = "# The learning rate is a tenth of that of ESC's training from scratch; the number of iterations is a choice."


def option_files(identifier: str, network_g: Mapping[str, Any], weights: str, gt_size: int | None) -> dict[str, str]:
    """The option files to test and to fine-tune a network, by name.

    They are for the folder that they are in: there are the file of weights, and `datasets/`. `gt_size` is the side of
    HR patches; None for LR patches of 64.
    """
    network, scale = network_named(network_g["type"]), network_g["upscaling_factor"]
    any_scale, real = network.any_scale, network.real_world
    paired = real or scale == 1  # LR images cannot be made by bicubic interpolation
    border = "scale" if any_scale else scale
    scores: Options = {
        name: {"type": f"calculate_{name}", "crop_border": border, "test_y_channel": True, "better": "higher"}
        for name in ("psnr", "ssim")
    }
    niqe = {"niqe": {"type": "calculate_niqe", "crop_border": scale, "better": "lower"}}
    source = "PairedImageDataset" if paired else "ArbitraryScaleDataset" if any_scale else "DownsampleImageDataset"
    patches = {"lq_size": 64, "scale_min": 1, "scale_max": 4, "sample_q": 4096}
    own = {
        "name": "own",
        "type": source,
        "dataroot_gt": "datasets/own/HR",
        **({"dataroot_lq": "datasets/own/LR"} if paired else {}),
        "io_backend": DISK,
        **(patches if any_scale else {"gt_size": gt_size or 64 * int(scale)}),
        "use_hflip": True,
        "use_rot": True,
        **LOADING,
    }
    own_val: Options = {"name": "own_val", "type": "PairedImageDataset", "dataroot_gt": "datasets/own/val/HR"}
    own_val |= {"dataroot_lq": "datasets/own/val/LR", "io_backend": DISK}
    photographs = {"name": "photographs", "type": "SingleImageDataset", "dataroot_lq": "datasets/photographs"}
    test_sets = {"test_1": {**photographs, "io_backend": DISK}} if real else _benchmarks("test", scale, any_scale)
    val_sets = {"val_1": own_val} if paired else _benchmarks("val", scale, any_scale)
    common = {
        "model_type": "ESCLTEModel" if any_scale else "ESCModel",
        **({} if any_scale else {"scale": scale}),
        "num_gpu": "auto",
        "manual_seed": 0,
    }
    rest = {"network_g": dict(network_g), "path": {"pretrain_network_g": weights, "strict_load_g": True}}
    test = {
        "name": f"test_{identifier}",
        **common,
        "datasets": test_sets,
        **rest,
        "val": {"save_img": True, "suffix": None, "metrics": niqe if real else scores},
    }
    train = {
        "name": f"finetune_{identifier}",
        **common,
        "datasets": {"train": own, **val_sets},
        **rest,
        "train": TRAINING,
        "val": {"val_freq": 5000, "save_img": False, "metrics": scores},
        "logger": {"print_freq": 100, "save_checkpoint_freq": 5000, "use_tb_logger": True},
    }
    test_data = "datasets/benchmark/* by `basicsr prepare benchmark`; delete the sections of sets that you do not have."
    train_data = "datasets/own/HR: your images (their LR images are made while training); datasets/benchmark/Set5."
    if real:
        test_data = "datasets/photographs: a folder of images."
    if paired:
        train_data = "datasets/own/HR, and datasets/own/LR with images of the same names; datasets/own/val/HR and LR."
    files = {}
    for command, options, what, more in (
        ("test", test, "tested with esc_arch", [f"# Data: {test_data}"]),
        ("train", train, "trained further on images of your own", [f"# Data: {train_data}", CHOICE]),
    ):
        file = f"{options['name']}.yml"
        head = [f"# {identifier}, {what}. In the folder that this file is in:", f"# basicsr {command} -opt {file}"]
        files[file] = "\n".join([*head, *more, "", _text(options)])
    return files


def _benchmarks(phase: str, scale: float, any_scale: bool) -> Options:
    sets: Options = {}
    for number, name in enumerate(BENCHMARKS if phase == "test" else BENCHMARKS[:1], 1):
        roots, kept = f"datasets/benchmark/{name}", {"io_backend": DISK}
        if any_scale:
            for factor in SCALES:
                section = {"name": f"{name}_x{factor}", "type": "ArbitraryScaleDataset", "dataroot_gt": f"{roots}/HR"}
                sets[f"{phase}_{name}_x{factor}"] = {**section, **kept, "scale": factor}
        else:
            section = {"name": name, "type": "PairedImageDataset", "dataroot_gt": f"{roots}/HR"}
            section |= {"dataroot_lq": f"{roots}/LR_bicubic/X{scale}", "filename_tmpl": f"{{}}x{scale}"}
            sets[f"{phase}_{number}"] = {**section, **kept}
    return sets


def _text(options: Options) -> str:
    """Plain values first, then a section each, with a blank line before it."""
    plain = {key: value for key, value in options.items() if not isinstance(value, dict)}
    parts = [plain, *({key: value} for key, value in options.items() if key not in plain)]
    # Copied by JSON: YAML would have the second of two equal sections refer to the first
    return "\n".join(yaml.safe_dump(json.loads(json.dumps(part)), sort_keys=False) for part in parts)
