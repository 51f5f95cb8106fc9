"""Everything that can be told wrong about an option file before a run, all of it at once.

Most of it BasicSR would find too: by a KeyError or a shape error, after it has put the old experiment's
folder aside, or never (faults 24, 27, 33, 42 and 46). What option files of other networks, models
and datasets may do is left alone: a check that does not surely apply is not made.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.suggestions import did_you_mean

from .data_checks import check_data
from .files import Options

__all__ = ["check_options", "check_shape"]

_LOSS_KEYS = ("pixel_opt", "perceptual_opt", "gan_opt", "ldl_opt", "feature_matching_opt")
_SCHEDULERS = {
    "MultiStepLR": MultiStepRestartLR,
    "MultiStepRestartLR": MultiStepRestartLR,
    "CosineAnnealingRestartLR": CosineAnnealingRestartLR,
}
_OPTIMIZERS = {
    name: entry
    for name, entry in vars(torch.optim).items()
    if inspect.isclass(entry) and issubclass(entry, torch.optim.Optimizer) and entry is not torch.optim.Optimizer
}
# Lists that must be of one length; those with a default have one entry then.
_LISTS_OF_ONE_LENGTH = {
    CosineAnnealingRestartLR: ("periods", "restart_weights"),
    MultiStepRestartLR: ("restarts", "restart_weights"),
}
_MAX_SEED = 2**32 - 1  # numpy's


def check_options(opt: Options, is_train: bool) -> list[str]:
    """All that is wrong with `opt` for training or testing; each entry names the key, the value and the cure.

    Options with a section of the wrong type are not looked at further.
    """
    return check_shape(opt) or list(
        chain(
            _check_general(opt),
            _check_networks(opt, is_train),
            _check_datasets(opt, is_train),
            _check_training(opt) if is_train else (),
            _check_metrics(opt),
            _check_paths(opt, is_train),
        )
    )


def check_shape(opt: Options) -> list[str]:
    """What must be mended before anything else can be looked at: the name, sections that are no mappings, odd keys."""
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


def _check_general(opt: Options) -> Iterator[str]:
    yield from _check_type("model_type", opt.get("model_type"), _entries(MODEL_REGISTRY))
    seed = opt.get("manual_seed")
    if seed is not None and not (_is_integer(seed, least=0) and seed <= _MAX_SEED):
        yield f"manual_seed: {seed!r} given; must be an integer from 0 to {_MAX_SEED}. Leave it out for a random one"
    yield from _check_num_gpu(opt)


def _check_num_gpu(opt: Options) -> Iterator[str]:
    asked, available = opt.get("num_gpu", "auto"), torch.cuda.device_count()
    if asked == "auto":
        return
    if not _is_integer(asked, least=0):
        yield f"num_gpu: {asked!r} given; must be auto, 0 (CPU) or a number of GPUs"
    elif asked > 0 and available == 0:
        yield f"num_gpu: {asked} given, but there is no CUDA device here. Set num_gpu: 0 or auto"
    elif asked > available and not opt.get("dist"):  # distributed, it may count the GPUs of several machines
        yield f"num_gpu: {asked} given, but there are {available} CUDA devices here. Set num_gpu: {available} or auto"


def _check_networks(opt: Options, is_train: bool) -> Iterator[str]:
    if opt.get("network_g") is None and _sr_model(opt) is not None:
        yield f"network_g: missing; {opt['model_type']} needs it: a mapping with type and the network's arguments"
    # A test builds no other network than network_g, so leftovers of training do no harm there.
    for key in [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]:
        if opt[key] is not None:
            yield from _check_call(key, opt[key], _entries(ARCH_REGISTRY))
    yield from _check_scale(opt)


def _check_scale(opt: Options) -> Iterator[str]:
    network, scale = opt.get("network_g"), opt.get("scale")
    if not isinstance(network, dict) or not _is_integer(scale):
        return
    for key in ("upscaling_factor", "upscale"):  # `scale` means other things in some networks
        if _is_integer(network.get(key)) and network[key] != scale:
            yield f"network_g:{key}: {network[key]} given, but scale is {scale}. Give both the same value"


def _check_datasets(opt: Options, is_train: bool) -> Iterator[str]:
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
        yield from _check_dataset(path, dataset, opt)


def _phase_problem(phase: str, is_train: bool) -> str | None:
    kind = phase.split("_")[0]
    if phase == "train" and not is_train:
        return "a training set cannot be tested; to train, use basicsr train. To test, keep only val or test sections"
    if phase == "train" or kind == "val" or (kind == "test" and not is_train):
        return None
    allowed = ["train", "val", "val_NAME"] if is_train else ["val", "val_NAME", "test", "test_NAME"]
    return f"not known when {'training' if is_train else 'testing'}. {did_you_mean(phase, allowed)}"


def _check_dataset(path: str, dataset: Options, opt: Options) -> Iterator[str]:
    types = _entries(DATASET_REGISTRY)
    kind = types.get(str(dataset.get("type")))
    yield from _check_type(f"{path}:type", dataset.get("type"), types)
    if path == "datasets:train":
        yield from _check_loading(path, dataset)
    if kind is not None:
        scale, metrics = opt.get("scale", dataset.get("scale")), (opt.get("val") or {}).get("metrics")
        yield from check_data(path, dataset, kind, scale=scale, measured=bool(metrics))


def _check_loading(path: str, dataset: Options) -> Iterator[str]:
    batch, workers, mode = (dataset.get(k) for k in ("batch_size_per_gpu", "num_worker_per_gpu", "prefetch_mode"))
    if not _is_integer(batch, least=1):
        yield f"{path}:batch_size_per_gpu: {batch!r} given; must be a positive integer, such as 16"
    if workers is not None and not _is_integer(workers, least=0):
        yield f"{path}:num_worker_per_gpu: {workers!r} given; must be 0 (load in the main process) or more"
    if mode not in (None, "cpu", "cuda"):
        yield f"{path}:prefetch_mode: {mode!r} given; must be ~ (none), cpu or cuda"


def _check_training(opt: Options) -> Iterator[str]:
    train = opt.get("train")
    if not train:
        yield "train: missing; training needs this section, with total_iter, optim_g, scheduler and pixel_opt"
        return
    total = train.get("total_iter")
    if not _is_whole(total):
        yield f"train:total_iter: {total!r} given; must be a positive whole number, such as 500000"
    losses = [key for key in _LOSS_KEYS if train.get(key)]
    for key in losses:
        yield from _check_call(f"train:{key}", train[key], _entries(LOSS_REGISTRY))
    model = _sr_model(opt)
    if model is None:
        return
    if problems_of := getattr(model, "option_problems", None):  # a model that has options of its own
        yield from problems_of(opt)
    if not losses and _is_ours(model.init_training_settings):
        yield "train: has no loss; give one of pixel_opt and perceptual_opt, such as pixel_opt: {type: L1Loss}"
    if _is_ours(model.get_optimizer):
        yield from _check_optimizers(train)
    if _is_ours(model.setup_schedulers):
        yield from _check_scheduler(train, total)


def _check_optimizers(train: Options) -> Iterator[str]:
    for key in ["optim_g", *(key for key in train if key.startswith("optim_") and key != "optim_g")]:
        # BasicSR hands the learning rate on by position, so it cannot be left to its default.
        yield from _check_call(f"train:{key}", train.get(key), _OPTIMIZERS, supplied=["params"], needed=["lr"])


def _check_scheduler(train: Options, total: Any) -> Iterator[str]:
    path = "train:scheduler"
    scheduler: Any = train.get("scheduler")
    problems = list(_check_call(path, scheduler, _SCHEDULERS, supplied=["optimizer", "last_epoch"]))
    yield from problems
    if problems:
        return
    first, second = _LISTS_OF_ONE_LENGTH[_SCHEDULERS[scheduler["type"]]]
    lengths = [len(value) if isinstance(value := scheduler.get(key), list) else 1 for key in (first, second)]
    if lengths[0] != lengths[1]:
        yield f"{path}: {first} has {lengths[0]} entries and {second} {lengths[1]}. Give both the same number"
    if first != "periods" or not _is_whole(total):
        return
    periods = scheduler["periods"]
    if not isinstance(periods, list) or not all(_is_whole(period) for period in periods):
        yield f"{path}:periods: {periods!r} given; must be a list of iterations, such as [{int(total)}]"
    elif sum(periods) < total - 1:  # it is first stepped in the second iteration
        yield f"{path}:periods: {periods} end before train:total_iter {total}. Make their sum as large"


def _check_metrics(opt: Options) -> Iterator[str]:
    metrics = (opt.get("val") or {}).get("metrics")
    if metrics is None:
        return
    if not isinstance(metrics, dict):
        yield f"val:metrics: {metrics!r} given; must be a mapping of names, such as psnr: {{type: calculate_psnr}}"
        return
    for name, metric in metrics.items():
        yield from _check_call(
            f"val:metrics:{name}", metric, _entries(METRIC_REGISTRY), supplied=["img", "img2"], extra=["better"]
        )


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


def _check_type(path: str, name: Any, known: Mapping[str, Any]) -> Iterator[str]:
    names = [entry for entry in known if not entry.endswith("_basicsr")]  # each is there by its short name too
    if name is None:
        yield f"{path}: missing. Allowed: {', '.join(sorted(names))}"
    elif not isinstance(name, str) or name not in known:
        yield f"{path}: {name!r} is not known. {did_you_mean(name, names)}"


def _check_call(
    path: str,
    section: Any,
    known: Mapping[str, Any],
    *,
    supplied: Iterable[str] = (),
    needed: Iterable[str] = (),
    extra: Iterable[str] = (),
) -> Iterator[str]:
    """Whether `known[section['type']]` can be called with the rest of `section`.

    BasicSR supplies the arguments `supplied` itself and takes the keys `extra` out; keys `needed` must
    be given though the callable has defaults for them.
    """
    if not isinstance(section, dict):
        yield f"{path}: {section!r} given; must be a mapping with type and its arguments"
        return
    problems = list(_check_type(f"{path}:type", section.get("type"), known))
    yield from problems
    if problems:
        return
    parameters = inspect.signature(known[section["type"]]).parameters.values()
    named = {
        entry.name: entry
        for entry in parameters
        if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY) and entry.name not in supplied
    }
    if not any(entry.kind is entry.VAR_KEYWORD for entry in parameters):
        for key in sorted(section.keys() - named.keys() - {"type", *extra}):
            yield f"{path}:{key}: {section['type']} has no such argument. {did_you_mean(key, named)}"
    required = {name for name, entry in named.items() if entry.default is entry.empty}
    for key in sorted(required.union(needed) - section.keys()):
        yield f"{path}:{key}: missing; {section['type']} needs it"


def _entries(registry: Any) -> dict[str, Any]:
    """What a BasicSR registry holds, its own entries by their short names too, as `Registry.get` finds them."""
    entries = dict(iter(registry))
    short = {name.removesuffix("_basicsr"): entry for name, entry in entries.items()}
    return short | entries


def _sr_model(opt: Options) -> type[SRModel] | None:
    """The class of `model_type` if it is a kind of SRModel: others may use the options in their own way."""
    model = _entries(MODEL_REGISTRY).get(str(opt.get("model_type")))
    return model if inspect.isclass(model) and issubclass(model, SRModel) else None


def _is_ours(method: Any) -> bool:
    """Whether a model's method is one whose needs are known, and not of another package."""
    return method.__module__.split(".")[0] in ("basicsr", "esc_arch")


def _is_integer(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _is_whole(value: Any) -> bool:
    """A positive integer, or a float like `!!float 5e5` that is one."""
    return _is_integer(value, least=1) or (isinstance(value, float) and value >= 1 and value.is_integer())
