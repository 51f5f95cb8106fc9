"""Everything that can be told wrong about an option file before a run, all of it at once.

Most of it BasicSR would find too: by a KeyError or a shape error, after it has put the old experiment's
folder aside, or never (faults 24, 27, 33, 42 and 46). What option files of other networks, models
and datasets may do is left alone: a check that does not surely apply is not made.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.archs import ESCLTE
from esc_arch.archs.base import ESCFamily
from esc_arch.models import ESCModel
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.metrics import needs_ground_truth
from esc_arch.suggestions import did_you_mean

from .data_checks import CheckScope, check_data
from .files import Options
from .key_usage import usage_of
from .section_checks import check_call, check_type, entries, is_basicsr_s_or_ours, is_integer, sr_model
from .training_checks import check_logger, check_training

__all__ = ["check_options", "check_shape"]

_MAX_SEED = 2**32 - 1  # numpy's
#: Metrics of BasicSR that its models cannot use.
_OF_TENSORS = ("calculate_psnr_pt", "calculate_ssim_pt")


def check_options(opt: Options, is_train: bool, extent: CheckScope | None = None) -> list[str]:
    """All that is wrong with `opt` for training or testing; each entry names the key, the value and the cure.

    Options with a section of the wrong type are not looked at further. `extent` says how much of the data is.
    """
    extent = extent or CheckScope()
    return check_shape(opt) or list(
        chain(
            _check_general(opt, extent),
            _check_networks(opt, is_train),
            _check_datasets(opt, is_train, extent),
            check_training(opt) if is_train else (),
            _check_metrics(opt),
            _check_protocol(opt),
            check_logger(opt) if is_train else (),
            _check_paths(opt, is_train) if extent.with_files else (),
        )
    )


def check_shape(opt: Options) -> list[str]:
    """What must be fixed before anything else can be looked at: the name, sections that are no mappings, odd keys."""
    return list(chain(_check_name(opt), _check_sections(opt), _check_keys(opt, "")))


def _check_name(opt: Options) -> Iterator[str]:
    name = opt.get("name")
    if not isinstance(name, str) or not name:
        yield f"name: {name!r} given; must be text, in quotes if it looks like a number. It names the run's folder"
    elif "/" in name or os.sep in name or name in (".", ".."):
        yield f"name: {name!r} given; must be one folder's name, without path separators. Choose folders with path:"


def _check_sections(opt: Options) -> Iterator[str]:
    for key in ("path", "logger", "val", "train"):
        if not isinstance(opt.get(key, {}), dict | None):
            yield f"{key}: {opt[key]!r} given; must be a mapping of 'key: value' lines"
    datasets = opt.get("datasets")
    if not isinstance(datasets, dict) or not datasets:
        yield f"datasets: {datasets!r} given; must be a mapping with a section for each data set (train, val, ...)"
        return
    for phase, dataset in datasets.items():
        if not isinstance(dataset, dict):
            yield f"datasets:{phase}: {dataset!r} given; must be a mapping with type, dataroot_gt, ..."


def _check_keys(section: Mapping[Any, Any], path: str) -> Iterator[str]:
    for key, value in section.items():
        if not isinstance(key, str):  # BasicSR fails when it prints the options
            yield f"{path}{key}: the key is {type(key).__name__} {key!r}; keys must be text: put it in quotes"
        if isinstance(value, dict):
            yield from _check_keys(value, f"{path}{key}:")


def _check_general(opt: Options, extent: CheckScope) -> Iterator[str]:
    yield from check_type("model_type", opt.get("model_type"), entries(MODEL_REGISTRY))
    seed = opt.get("manual_seed")
    if seed is not None and not (is_integer(seed, least=0) and seed <= _MAX_SEED):
        yield f"manual_seed: {seed!r} given; must be an integer from 0 to {_MAX_SEED}. Leave it out for a random one"
    yield from _check_num_gpu(opt, extent)


def _check_num_gpu(opt: Options, extent: CheckScope) -> Iterator[str]:
    asked, available = opt.get("num_gpu", "auto"), torch.cuda.device_count()
    if asked == "auto":
        return
    if not is_integer(asked, least=0):
        yield f"num_gpu: {asked!r} given; must be auto, 0 (CPU) or a number of GPUs"
    elif not extent.with_files:
        return
    elif asked > 0 and available == 0:
        yield f"num_gpu: {asked} given, but there is no CUDA device here. Set num_gpu: 0 or auto"
    elif asked > available and not opt.get("dist"):  # distributed, it may count the GPUs of several machines
        yield f"num_gpu: {asked} given, but there are {available} CUDA devices here. Set num_gpu: {available} or auto"


def _check_networks(opt: Options, is_train: bool) -> Iterator[str]:
    if opt.get("network_g") is None and sr_model(opt) is not None:
        yield f"network_g: missing; {opt['model_type']} needs it: a mapping with type and the network's arguments"
    # A test builds no other network than network_g, so leftovers of training do no harm there.
    for key in [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]:
        if opt[key] is not None:
            yield from check_call(key, opt[key], entries(ARCH_REGISTRY))
    yield from _check_scale(opt)


def _check_scale(opt: Options) -> Iterator[str]:
    network, scale = opt.get("network_g"), opt.get("scale")
    if not isinstance(network, dict) or not is_integer(scale):
        return
    for key in ("upscaling_factor", "upscale"):  # `scale` means other things in some networks
        if is_integer(network.get(key)) and network[key] != scale:
            yield f"network_g:{key}: {network[key]} given, but scale is {scale}. Give both the same value"
    name = network.get("type")
    kind = entries(ARCH_REGISTRY).get(name) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, ESCFamily) or issubclass(kind, ESCLTE):  # of any scale
        return
    if "upscaling_factor" not in network:
        default = inspect.signature(kind).parameters["upscaling_factor"].default
        if is_integer(default) and default != scale:
            yield (
                f"network_g:upscaling_factor: not given, and {default} by default, but scale is {scale}. Give both the "
                "same value"
            )


def _check_datasets(opt: Options, is_train: bool, extent: CheckScope) -> Iterator[str]:
    datasets = opt["datasets"]
    if is_train and "train" not in datasets:
        yield f"datasets: has {', '.join(datasets)} but no train; training needs it. To test, use basicsr test"
    names: dict[str, str] = {}
    for phase, dataset in datasets.items():
        path = f"datasets:{phase}"
        problem = _phase_problem(phase, is_train)
        if problem:
            yield f"{path}: {problem}"
            continue
        name = str(dataset.get("name", phase))
        if name in names:
            yield f"{path}:name: {name!r} is also the name of {names[name]}; they would share results. Rename one"
        names[name] = path
        yield from _check_dataset(path, dataset, opt, extent)


def _phase_problem(phase: str, is_train: bool) -> str | None:
    kind = phase.split("_")[0]
    if phase == "train" and not is_train:
        return "a training set cannot be tested; to train, use basicsr train. To test, keep only val or test sections"
    if phase == "train" or kind == "val" or (kind == "test" and not is_train):
        return None
    allowed = ["train", "val", "val_NAME"] if is_train else ["val", "val_NAME", "test", "test_NAME"]
    return f"not known when {'training' if is_train else 'testing'}. {did_you_mean(phase, allowed)}"


def _check_dataset(path: str, dataset: Options, opt: Options, extent: CheckScope) -> Iterator[str]:
    types = entries(DATASET_REGISTRY)
    kind = types.get(str(dataset.get("type")))
    yield from check_type(f"{path}:type", dataset.get("type"), types)
    if path == "datasets:train":
        yield from _check_loading(path, dataset)
    if kind is not None:
        scale = opt.get("scale", dataset.get("scale"))
        problems = list(check_data(path, dataset, kind, scale=scale, metrics=_metrics(opt), extent=extent))
        yield from problems
        yield from _check_required(path, dataset, kind, problems)


def _check_required(path: str, dataset: Options, kind: type, told: list[str]) -> Iterator[str]:
    """Whether there is all that the class takes in any case, as its source says; but for what is `told` already."""
    usage = usage_of(kind)
    required = usage.requires_in_training if dataset.get("phase") == "train" else usage.requires
    # What null is to another package is not known
    missing = {key for key in required if key not in dataset or (dataset[key] is None and is_basicsr_s_or_ours(kind))}
    for key in sorted(missing - {"name", "phase", "scale", "io_backend"}):  # put there, or looked at, by others
        if not any(problem.startswith(f"{path}:{key}:") for problem in told):
            yield f"{path}:{key}: missing; {dataset['type']} needs it"


def _check_loading(path: str, dataset: Options) -> Iterator[str]:
    batch, workers, mode = (dataset.get(k) for k in ("batch_size_per_gpu", "num_worker_per_gpu", "prefetch_mode"))
    if not is_integer(batch, least=1):
        yield f"{path}:batch_size_per_gpu: {batch!r} given; must be a positive integer, such as 16"
    if workers is not None and not is_integer(workers, least=0):
        yield f"{path}:num_worker_per_gpu: {workers!r} given; must be 0 (load in the main process) or more"
    if mode not in (None, "cpu", "cuda"):
        yield f"{path}:prefetch_mode: {mode!r} given; must be ~ (none), cpu or cuda"


def _check_metrics(opt: Options) -> Iterator[str]:
    metrics = (opt.get("val") or {}).get("metrics")
    if metrics is None:
        return
    if not isinstance(metrics, dict):
        yield f"val:metrics: {metrics!r} given; must be a mapping of names, such as psnr: {{type: calculate_psnr}}"
        return
    model = sr_model(opt)
    without_gt = [
        phase
        for phase, dataset in opt["datasets"].items()
        if phase != "train" and dataset.get("type") == "SingleImageDataset"
    ]
    for name, metric in metrics.items():
        path = f"val:metrics:{name}"
        problems = list(check_call(path, metric, entries(METRIC_REGISTRY), supplied=["img", "img2"], extra=["better"]))
        yield from problems
        if problems or model is None or not is_basicsr_s_or_ours(model.nondist_validation):
            continue
        if metric["type"] in _OF_TENSORS:
            yield f"{path}:type: {metric['type']} takes tensors, and validation has images. Give {metric['type'][:-3]}"
        elif without_gt and needs_ground_truth(metric):
            yield (
                f"{path}: {metric['type']} compares with ground truth, and datasets:{without_gt[0]} has none "
                f"(SingleImageDataset). Remove the metric, or the data set, or give PairedImageDataset with its GT"
            )


def _metrics(opt: Options) -> dict[str, Options]:
    """The entries of `val: metrics:`, as far as they are such."""
    metrics = (opt.get("val") or {}).get("metrics")
    return {name: m for name, m in metrics.items() if isinstance(m, dict)} if isinstance(metrics, dict) else {}


def _check_protocol(opt: Options) -> Iterator[str]:
    val, model = opt.get("val") or {}, sr_model(opt)
    own = model is not None and issubclass(model, ESCModel)
    others = model is not None and is_basicsr_s_or_ours(model) and not own
    for key in [key for key in ("protocol", "per_image") if val.get(key) and others]:
        yield f"val:{key}: {opt['model_type']} does not use it; ESCModel does. Change model_type, or remove it"
    if own and val.get("protocol") not in (None, *PROTOCOLS):
        yield f"val:protocol: {val['protocol']!r} is not known. {did_you_mean(val['protocol'], PROTOCOLS)}"


def _check_paths(opt: Options, is_train: bool) -> Iterator[str]:
    paths = opt.get("path") or {}
    state = paths.get("resume_state")
    if is_train and state and not opt.get("auto_resume") and not os.path.isfile(str(state)):
        yield f"path:resume_state: {state!r} given, but there is no file {os.path.abspath(str(state))}"
    resumed = is_train and (_has_states(paths) if opt.get("auto_resume") else bool(state))
    for key, file in paths.items():
        network = key.removeprefix("pretrain_")
        replaced = resumed and network not in (paths.get("ignore_resume_networks") or ())
        if network == key or not key.startswith("pretrain_network_") or file is None or replaced:
            continue
        if not isinstance(file, str) or not os.path.isfile(file):
            yield (
                f"path:{key}: {file!r} given, but there is no file {os.path.abspath(str(file))}. "
                "Relative paths start in the current folder"
            )


def _has_states(paths: Options) -> bool:
    """Whether `--auto_resume` finds something to resume."""
    folder = paths.get("training_states", "")
    return os.path.isdir(folder) and any(name.endswith(".state") for name in os.listdir(folder))
