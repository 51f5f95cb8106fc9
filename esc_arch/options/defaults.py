"""What option files may leave out, and what `basicsr` derives from the rest (faults 24, 27, 33, 42 and 46).

The sections of an option file have passed `checks.check_shape` before they come here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from esc_arch.data import ArbitraryScaleDataset
from esc_arch.training.distributed import print_note

from .files import Options
from .keys import KEYS, find_key
from .section_checks import entries, is_esc_model, is_known_code, sr_model

__all__ = ["set_debug", "set_defaults", "set_paths"]


def set_defaults(opt: Options, is_train: bool) -> None:
    """Fill in what `opt` leaves out, in place, and adapt it to a machine without CUDA."""
    if opt.get("num_gpu", "auto") == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    _fill(opt, "path", {})
    if is_train and opt.get("train"):
        _fill(opt["train"], "ema_decay", 0)  # BasicSR compares it with 0, and cannot compare null
    _complete(opt, "logger", "print_freq", "save_checkpoint_freq", "use_tb_logger")
    if not is_train or opt.get("val") is not None:  # when training, no `val` means no validation
        _complete(opt, "val", "val_freq", "save_img", "suffix")
    tb_images = is_train and is_esc_model(opt) and (opt.get("val") or {}).get("tb_images")
    if tb_images and not opt["logger"]["use_tb_logger"]:
        print_note("val:tb_images shows nothing: TensorBoard is off (logger:use_tb_logger: true turns it on).")
    if not is_train:
        _set_tested_weights(opt)
    for phase, dataset in opt["datasets"].items():
        _set_dataset_defaults(phase, dataset, opt)


def _set_tested_weights(opt: Options) -> None:
    """Test what validation used: the averaged weights, where the checkpoint has them and the file does not say.

    A model of another package may read weights in a way of its own, and BasicSR's default, `params`, stays.
    """
    paths, model, train = opt["path"], sr_model(opt), opt.get("train")
    is_open = paths.get("pretrain_network_g") and "param_key_g" not in paths
    if is_open and model is not None and is_known_code(model.load_network):
        wants_params = isinstance(train, dict) and train.get("use_ema") is False
        paths["param_key_g"] = "params" if wants_params else "params_ema"


def set_debug(opt: Options, asked: bool, is_train: bool) -> None:
    """`--debug`: another name; and, in any training with "debug" in its name, everything every few iterations."""
    if asked and not opt["name"].startswith("debug"):
        opt["name"] = f"debug_{opt['name']}"
    if is_train and "debug" in opt["name"]:
        opt["logger"].update(print_freq=1, save_checkpoint_freq=8)
        if opt.get("val") is not None:
            opt["val"]["val_freq"] = 8


def set_paths(opt: Options, root_path: str, is_train: bool) -> None:
    """Expand `~` in `opt['path']` and set the folders that the run writes to.

    `experiments_root` and `results_root` of the file are folders to which the name is added, as in
    BasicSR after 1.4.2 (fault 27). Unknown keys, of which `check_keys` warns, are dropped: BasicSR would make folders
    of their values (fault 33). A model of another package may read them, and they stay.
    """
    read_by_others = not is_known_code(entries(MODEL_REGISTRY).get(str(opt.get("model_type"))))
    paths = {
        key: _expand_user(value)
        for key, value in opt["path"].items()
        if find_key(KEYS["path"], key) or (read_by_others and isinstance(value, str))
    }
    bases = {key: paths.pop(key, None) or KEYS["path"][key].default for key in ("experiments_root", "results_root")}
    root_key = "experiments_root" if is_train else "results_root"
    root = os.path.join(root_path, str(bases[root_key]), opt["name"])
    folders = ("models", "training_states", "visualization") if is_train else ("visualization",)
    paths |= {root_key: root, "log": root} | {folder: os.path.join(root, folder) for folder in folders}
    opt["path"] = paths


def _complete(opt: Options, section: str, *keys: str) -> None:
    opt[section] = {key: KEYS[section][key].default for key in keys} | (opt.get(section) or {})


def _fill(section: Options, key: str, value: Any) -> None:
    """`section[key] = value` where there is nothing or null."""
    if section.get(key) is None:
        section[key] = value


def _set_dataset_defaults(phase: str, dataset: Options, opt: Options) -> None:
    dataset["phase"] = phase.split("_")[0]  # val_1, val_2, ... are all validation
    kind = entries(DATASET_REGISTRY).get(str(dataset.get("type")))
    if "scale" in opt and (kind is not ArbitraryScaleDataset or "scale" not in dataset):
        dataset["scale"] = opt["scale"]
    _fill(dataset, "name", phase)
    _fill(dataset, "io_backend", {"type": "disk"})
    if dataset.get("type") == "SingleImageDataset" and dataset.get("meta_info_file", "") is None:
        del dataset["meta_info_file"]  # BasicSR would open the file None
    for key, value in dataset.items():
        if key.startswith(("dataroot", "meta_info")):
            dataset[key] = _expand_user(value)
    if dataset["phase"] == "train":
        _fill(dataset, "num_worker_per_gpu", 4)
        if dataset.get("type") == "PairedImageDataset":  # others have their own defaults or recipes
            _fill(dataset, "use_hflip", dataset.get("use_flip", True))  # its older name
            _fill(dataset, "use_rot", True)
    _adapt_loading(phase, dataset)


def _adapt_loading(phase: str, dataset: Options) -> None:
    """Turn off what this machine, or a loader without workers, cannot do."""
    cuda, is_train = torch.cuda.is_available(), dataset["phase"] == "train"
    # BasicSR loads validation images without workers whatever the option file says.
    workers = dataset.get("num_worker_per_gpu") if is_train else 0
    if workers:
        dataset.setdefault("persistent_workers", True)  # in distributed training, restarting takes seconds (fault 21)
    elif dataset.get("persistent_workers"):
        print_note(f"datasets:{phase}:persistent_workers is off: there are no workers.")
        dataset["persistent_workers"] = False
    if is_train and dataset.get("prefetch_mode") == "cpu" and workers == 0:
        # Its thread would draw random numbers at the same time as the training: no run could be repeated
        print_note(f"datasets:{phase}:prefetch_mode is off: without workers there is nothing to fetch from.")
        dataset["prefetch_mode"] = None
    if dataset.get("prefetch_mode") == "cuda" and not cuda:
        print_note(f"datasets:{phase}:prefetch_mode is cpu: there is no CUDA device.")
        dataset["prefetch_mode"] = "cpu"
    elif dataset.get("prefetch_mode") == "cuda" and dataset.get("pin_memory") is not True:
        print_note(f"datasets:{phase}:pin_memory is on: prefetch_mode cuda needs it.")
        dataset["pin_memory"] = True
    if dataset.get("pin_memory") and not cuda:
        dataset["pin_memory"] = False


def _expand_user(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_user(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) else value
