"""Option files for a network that is published: one to test it, one to train it further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from esc_arch.options import Options

__all__ = ["option_files"]

BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
#: Types that were trained on photographs, not on images made small by bicubic interpolation.
REAL = ("ESCReal", "ESCRealM")
#: Scales that ESCLTE is tested at.
LTE_SCALES = (2, 3, 4)
DISK = {"type": "disk"}


def option_files(identifier: str, network_g: Mapping[str, Any], weights: str, gt_size: int | None) -> dict[str, str]:
    """The option files to test and to fine-tune a network, by name.

    They are for the folder that they are in: there are the weights, and `datasets/`.

    Args:
        identifier: of the model.
        network_g: type and options of the network.
        weights: the file's name.
        gt_size: side of HR patches; None for LR patches of 64.
    """
    kind, scale = network_g["type"], network_g["upscaling_factor"]
    head = {"model_type": "ESCLTEModel" if kind == "ESCLTE" else "ESCModel"}
    head |= {} if kind == "ESCLTE" else {"scale": scale}
    common = {**head, "num_gpu": "auto", "manual_seed": 0}
    rest = {"network_g": dict(network_g), "path": {"pretrain_network_g": weights, "strict_load_g": True}}
    real = kind in REAL
    test = {
        "name": f"test_{identifier}",
        **common,
        "datasets": _photographs() if real else _benchmarks("test", kind, scale),
        **rest,
        "val": {"save_img": True, "suffix": None, "metrics": _niqe(scale) if real else _metrics(kind, scale)},
    }
    paired = real or scale == 1
    train = {
        "name": f"finetune_{identifier}",
        **common,
        "datasets": {
            "train": _own_images(kind, scale, gt_size, paired=paired),
            **(_own_pairs() if paired else _benchmarks("val", kind, scale)),
        },
        **rest,
        "train": _training(),
        "val": {"val_freq": 5000, "save_img": False, "metrics": _metrics(kind, scale)},
        "logger": {"print_freq": 100, "save_checkpoint_freq": 5000, "use_tb_logger": True},
    }
    return {
        f"test_{identifier}.yml": _text(test, _test_head(identifier, real=real)),
        f"finetune_{identifier}.yml": _text(train, _train_head(identifier, paired=paired)),
    }


def _test_head(identifier: str, *, real: bool) -> list[str]:
    data = (
        "datasets/photographs: a folder of images."
        if real
        else "datasets/benchmark/* by `basicsr prepare benchmark`; delete the sections of sets that you do not have."
    )
    return [
        f"{identifier}, tested with esc_arch. In the folder that this file is in:",
        f"basicsr test -opt test_{identifier}.yml",
        f"Data: {data}",
    ]


def _train_head(identifier: str, *, paired: bool) -> list[str]:
    data = (
        "datasets/own/HR, and datasets/own/LR with images of the same names; datasets/own/val/HR and LR."
        if paired
        else "datasets/own/HR: your images (their LR images are made while training); datasets/benchmark/Set5."
    )
    return [
        f"{identifier}, trained further on images of your own. In the folder that this file is in:",
        f"basicsr train -opt finetune_{identifier}.yml",
        f"Data: {data}",
        "The learning rate is a tenth of that of ESC's training from scratch; the number of iterations is a choice.",
    ]


def _benchmarks(phase: str, kind: str, scale: float) -> Options:
    names = BENCHMARKS if phase == "test" else BENCHMARKS[:1]
    if kind == "ESCLTE":
        return {
            f"{phase}_{name}_x{factor}": {
                "name": f"{name}_x{factor}",
                "type": "ArbitraryScaleDataset",
                "dataroot_gt": f"datasets/benchmark/{name}/HR",
                "io_backend": DISK,
                "scale": factor,
            }
            for name in names
            for factor in LTE_SCALES
        }
    return {
        f"{phase}_{number}": {
            "name": name,
            "type": "PairedImageDataset",
            "dataroot_gt": f"datasets/benchmark/{name}/HR",
            "dataroot_lq": f"datasets/benchmark/{name}/LR_bicubic/X{scale}",
            "filename_tmpl": f"{{}}x{scale}",
            "io_backend": DISK,
        }
        for number, name in enumerate(names, 1)
    }


def _photographs() -> Options:
    section = {"type": "SingleImageDataset", "dataroot_lq": "datasets/photographs", "io_backend": DISK}
    return {"test_1": {"name": "photographs", **section}}


def _own_pairs() -> Options:
    roots = {"dataroot_gt": "datasets/own/val/HR", "dataroot_lq": "datasets/own/val/LR"}
    return {"val_1": {"name": "own_val", "type": "PairedImageDataset", **roots, "io_backend": DISK}}


def _own_images(kind: str, scale: float, gt_size: int | None, *, paired: bool) -> Options:
    if kind == "ESCLTE":
        size: Options = {"lq_size": 64, "scale_min": 1, "scale_max": 4, "sample_q": 4096}
    else:
        size = {"gt_size": gt_size or 64 * int(scale)}
    source = "ArbitraryScaleDataset" if kind == "ESCLTE" else "DownsampleImageDataset"
    return {
        "name": "own",
        "type": "PairedImageDataset" if paired else source,
        "dataroot_gt": "datasets/own/HR",
        **({"dataroot_lq": "datasets/own/LR"} if paired else {}),
        "io_backend": DISK,
        **size,
        "use_hflip": True,
        "use_rot": True,
        "num_worker_per_gpu": 4,
        "batch_size_per_gpu": 16,
        "dataset_enlarge_ratio": 100,
        "prefetch_mode": None,
        "pin_memory": True,
    }


def _training() -> Options:
    return {
        "ema_decay": 0.999,
        "optim_g": {"type": "AdamW", "lr": 5e-5, "weight_decay": 0, "betas": [0.9, 0.9]},
        "scheduler": {"type": "MultiStepLR", "milestones": [50000, 80000, 90000, 95000], "gamma": 0.5},
        "total_iter": 100000,
        "warmup_iter": -1,
        "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
    }


def _metrics(kind: str, scale: float) -> Options:
    border = "scale" if kind == "ESCLTE" else scale
    return {
        name: {"type": f"calculate_{name}", "crop_border": border, "test_y_channel": True, "better": "higher"}
        for name in ("psnr", "ssim")
    }


def _niqe(scale: float) -> Options:
    return {"niqe": {"type": "calculate_niqe", "crop_border": scale, "better": "lower"}}


class _Dumper(yaml.SafeDumper):
    """Writes equal sections out, where YAML would have the second refer to the first."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(options: Options, head: list[str]) -> str:
    parts = [yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False) for key, value in options.items()]
    plain = "".join(part for part, value in zip(parts, options.values(), strict=True) if not isinstance(value, dict))
    sections = [part for part, value in zip(parts, options.values(), strict=True) if isinstance(value, dict)]
    return "\n".join(["".join(f"# {line}\n" for line in head), plain, *sections])
