"""Everything that can be told wrong about an option file before a run, all of it at once.

Most of it BasicSR would find too: by a KeyError or a shape error, after it has put the old experiment's
folder aside, or never (faults 24, 27, 33, 42 and 46). What option files of other networks, models
and datasets may do is left alone: a check that does not surely apply is not made.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.archs import ESCLTE
from esc_arch.archs.base import ESCFamily
from esc_arch.errors import UserError
from esc_arch.models import ESCLTEModel
from esc_arch.models.metrics import needs_ground_truth
from esc_arch.names import did_you_mean
from esc_arch.printing import shown
from esc_arch.problems import Problem, join, of_severity, wrong_value
from esc_arch.project import import_modules

from .data_checks import check_data
from .defaults import set_debug, set_defaults, set_paths
from .files import Options, apply_force_yml, load_with_positions
from .keys import KEYS, REQUIRED
from .network_checks import check_networks
from .section_checks import (
    QUICK,
    CheckScope,
    check_call,
    check_keys,
    check_type,
    check_values,
    entries,
    is_integer,
    is_known_code,
    metrics_of,
    missing_keys,
    sr_model,
)
from .training_checks import check_logger, check_training

__all__ = ["Inspection", "check_options", "check_sections", "inspect_options"]

#: Metrics of BasicSR that its models cannot use.
_OF_TENSORS = ("calculate_psnr_pt", "calculate_ssim_pt")


@dataclass(frozen=True)
class Inspection:
    """What was found in an option file.

    Attributes:
        opt: the options; complete for BasicSR's pipelines if there are no errors.
        is_train: True if they were checked as those of a training, False as those of a test.
        problems: all findings with their places, in the order of the file.
    """

    opt: Options
    is_train: bool
    problems: Sequence[Problem]


def inspect_options(
    file: str,
    *,
    root_path: str,
    is_train: bool | None,
    force_yml: Sequence[str] = (),
    auto_resume: bool = False,
    debug: bool = False,
    dist: bool = False,
    scope: CheckScope = QUICK,
) -> Inspection:
    """Read an option file, complete it, and check all of it.

    Args:
        root_path: the folder that `experiments/` and `results/` are in.
        is_train: True to train, False to test; None: to train if it has anything to train.

    Raises:
        UserError: the file or an entry of `force_yml` cannot be read at all.
    """
    opt, positions = load_with_positions(file)
    apply_force_yml(opt, force_yml, positions)
    if is_train is None:
        datasets = opt.get("datasets")
        is_train = isinstance(opt.get("train"), dict) or (isinstance(datasets, dict) and "train" in datasets)
    try:
        import_modules(opt.get("import"), "import")
        problems = list(check_shape(opt))
    except UserError as error:  # what the modules would have registered is not known
        problems = [Problem("import", str(error).removeprefix("import: "))]
    if all(problem.path == "name" for problem in problems):
        if problems:
            opt["name"] = "unnamed"  # so that the rest can be checked
        of_keys = list(check_keys(opt, is_train))
        opt |= {"dist": dist, "auto_resume": auto_resume, "is_train": is_train}
        set_defaults(opt, is_train)
        set_debug(opt, debug, is_train)
        set_paths(opt, root_path, is_train)
        problems += _merge(of_keys, check_sections(opt, is_train, scope))
        in_the_way = ("network_", "path", "train")
        if not any(problem.severity == "error" and problem.path.startswith(in_the_way) for problem in problems):
            problems += check_networks(opt, is_train, scope)
        problems = _merge(positions.odd_numbers(), [*problems, *positions.repeated.values()])
    return Inspection(opt, is_train, sorted(map(positions.locate, problems), key=_order))


def _order(problem: Problem) -> tuple[int, int]:
    place = problem.place
    return (place and place.line) or 0, (place and place.column) or 0


def check_options(opt: Options, is_train: bool, scope: CheckScope = QUICK) -> list[Problem]:
    """All errors of `opt`, as it was read, for training or testing; `scope` says how much of the data is checked.

    Options with a section of the wrong type are not checked further.
    """
    problems = list(check_shape(opt))
    if not problems:
        problems = _merge(check_keys(opt, is_train), check_sections(opt, is_train, scope))
    return of_severity(problems, "error")


def _merge(of_keys: Iterable[Problem], of_sections: Iterable[Problem]) -> list[Problem]:
    """Both, but of one key only what the more specific check says."""
    specific = list(of_sections)
    told = {problem.path for problem in specific}
    return specific + [problem for problem in of_keys if problem.path not in told]


def check_shape(opt: Options) -> Iterator[Problem]:
    """What must be fixed before anything else can be checked: the name, sections that are no mappings, odd keys."""
    for key in ("name", "path", "logger", "val", "train", "datasets"):
        yield from check_values("", {key: opt.get(key)}, KEYS[""])
    datasets = opt.get("datasets")
    if datasets == {}:
        yield Problem("datasets", "empty; give a section for each data set")
    for phase, dataset in datasets.items() if isinstance(datasets, dict) else ():
        if not isinstance(dataset, dict):
            yield wrong_value(f"datasets:{phase}", dataset, "a mapping with type, dataroot_gt, ...")
    yield from _check_key_types(opt, "")


def _check_key_types(section: Mapping[Any, Any], path: str) -> Iterator[Problem]:
    for key, value in section.items():
        inner = join(path, str(key))
        if not isinstance(key, str):  # BasicSR fails when it prints the options
            yield Problem(inner, f"the key is {type(key).__name__} {key!r}; keys must be text: put it in quotes")
        elif shown(key) != key:
            yield Problem(inner, "the key has control characters; write it without them")
        if isinstance(value, dict):
            yield from _check_key_types(value, inner)


def check_sections(opt: Options, is_train: bool, scope: CheckScope) -> Iterator[Problem]:
    """What is wrong with each section and what belongs to it, in options that have passed `check_shape`."""
    yield from check_type("model_type", opt.get("model_type"), entries(MODEL_REGISTRY))
    if scope.with_files:
        yield from _check_gpus(opt)
    yield from _check_networks(opt, is_train)
    yield from _check_datasets(opt, is_train, scope)
    yield from _check_metrics(opt)
    if is_train:
        yield from check_training(opt)
        yield from check_logger(opt)
    if scope.with_files:
        yield from _check_paths(opt, is_train)


def _check_gpus(opt: Options) -> Iterator[Problem]:
    asked, available = opt.get("num_gpu", "auto"), torch.cuda.device_count()
    if not is_integer(asked) or asked <= available:
        return
    if available == 0:
        yield Problem("num_gpu", f"{asked} given, but there is no CUDA device here. Set num_gpu: 0 or auto")
    elif not opt.get("dist"):  # distributed, it may count the GPUs of several machines
        yield Problem("num_gpu", f"{asked} given, but there are {available} CUDA devices. Set {available} or auto")


def _check_networks(opt: Options, is_train: bool) -> Iterator[Problem]:
    if opt.get("network_g") is None and sr_model(opt) is not None:
        yield Problem("network_g", f"missing; {opt['model_type']} needs it, with type and the network's arguments")
    # A test builds no other network than network_g, so leftovers of training do no harm there.
    for key in [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]:
        if opt[key] is not None:
            yield from check_call(key, opt[key], entries(ARCH_REGISTRY))
    network, scale = opt.get("network_g"), opt.get("scale")
    if not isinstance(network, dict) or not is_integer(scale):
        return
    for key in ("upscaling_factor", "upscale"):  # `scale` means other things in some networks
        if is_integer(network.get(key)) and network[key] != scale:
            yield Problem(f"network_g:{key}", f"{network[key]} given, but scale is {scale}. Give both the same value")
    kind: Any = entries(ARCH_REGISTRY).get(str(network.get("type")))
    is_esc = inspect.isclass(kind) and issubclass(kind, ESCFamily) and not issubclass(kind, ESCLTE)
    if is_esc and "upscaling_factor" not in network:
        default = inspect.signature(kind).parameters["upscaling_factor"].default
        if is_integer(default) and default != scale:
            yield Problem("network_g:upscaling_factor", f"missing, and {default} by default; give scale, {scale}")


def _check_datasets(opt: Options, is_train: bool, scope: CheckScope) -> Iterator[Problem]:
    datasets = opt["datasets"]
    if is_train and "train" not in datasets:
        yield Problem("datasets", f"has {', '.join(datasets)} but no train. To test, use basicsr test")
    names: dict[str, str] = {}
    for phase, dataset in datasets.items():
        path = f"datasets:{phase}"
        if problem := _phase_problem(phase, is_train):
            yield Problem(path, problem)
            continue
        name = str(dataset.get("name", phase))
        if name in names:
            yield Problem(f"{path}:name", f"{name!r} is also the name of {names[name]}. Rename one")
        names[name] = path
        yield from _check_dataset(path, dataset, opt, scope)


def _phase_problem(phase: str, is_train: bool) -> str | None:
    kind = phase.split("_")[0]
    if phase == "train" and not is_train:
        return "a training set cannot be tested; to train, use basicsr train. To test, keep only val or test sections"
    if phase == "train" or kind == "val" or (kind == "test" and not is_train):
        return None
    allowed = ["train", "val", "val_NAME"] if is_train else ["val", "val_NAME", "test", "test_NAME"]
    return f"not known when {'training' if is_train else 'testing'}. {did_you_mean(phase, allowed)}"


def _check_dataset(path: str, dataset: Options, opt: Options, scope: CheckScope) -> Iterator[Problem]:
    types, is_train = entries(DATASET_REGISTRY), path == "datasets:train"
    yield from check_type(f"{path}:type", dataset.get("type"), types)
    kind = types.get(str(dataset.get("type")))
    required = ["batch_size_per_gpu"] if is_train else []
    if kind is not None:
        scale = opt.get("scale", dataset.get("scale"))
        yield from check_data(path, dataset, kind, scale, metrics_of(opt), scope)
        required += REQUIRED.get(kind.__name__, []) if is_known_code(kind) else []
    yield from missing_keys(path, dataset, KEYS["datasets:*"], required)


def _check_metrics(opt: Options) -> Iterator[Problem]:
    model, datasets = sr_model(opt), opt["datasets"].items()
    without_gt = [name for name, data in datasets if name != "train" and data.get("type") == "SingleImageDataset"]
    options: Any = {"supplied": ["img", "img2"], "extra": ["better"], "table": KEYS["val:metrics:*"]}
    metrics = (opt.get("val") or {}).get("metrics")
    for name, metric in metrics.items() if isinstance(metrics, dict) else ():
        path = f"val:metrics:{name}"
        problems = list(check_call(path, metric, entries(METRIC_REGISTRY), **options))
        yield from problems
        if problems or model is None or not is_known_code(model.nondist_validation):
            continue
        kind = metric["type"]
        if metric.get("crop_border") == "scale" and not issubclass(model, ESCLTEModel):
            yield Problem(f"{path}:crop_border", "'scale' given, which only ESCLTEModel knows; give a number")
        if kind in _OF_TENSORS:
            yield Problem(f"{path}:type", f"{kind} takes tensors, and validation has images. Give {kind[:-3]}")
        elif without_gt and needs_ground_truth(metric):
            reason = f"{kind} compares with ground truth, and datasets:{without_gt[0]} has none (SingleImageDataset)"
            yield Problem(path, f"{reason}. Remove the metric, or the data set, or give PairedImageDataset with its GT")


def _check_paths(opt: Options, is_train: bool) -> Iterator[Problem]:
    paths = opt.get("path") or {}
    key = "experiments_root" if is_train else "results_root"
    written = {f"path:{key}": Path(str(paths.get(key, "")))}
    if is_train and (opt.get("logger") or {}).get("use_tb_logger"):
        written["logger:use_tb_logger"] = Path("tb_logger", opt["name"])
    if is_train and opt.get("auto_resume"):
        written["path:training_states"] = Path(str(paths.get("training_states", "")))
    for key, run in written.items():  # an earlier run is renamed or goes on
        if reason := _write_problem(run if opt.get("auto_resume") else run.parent):
            yield Problem(key, f"{run} cannot be written ({reason}). Change its rights, or write elsewhere")
    state = paths.get("resume_state")
    if is_train and state and not opt.get("auto_resume") and not os.path.isfile(str(state)):
        yield Problem("path:resume_state", f"{state!r} given, but there is no file {os.path.abspath(str(state))}")
    if opt.get("auto_resume"):
        state = next(Path(paths.get("training_states", "")).glob("*.state"), None)
    resumed = is_train and state
    for key, file in paths.items():
        network = key.removeprefix("pretrain_")
        replaced = resumed and network not in (paths.get("ignore_resume_networks") or ())
        if not key.startswith("pretrain_network_") or file is None or replaced:
            continue
        if not isinstance(file, str) or not os.path.isfile(file):
            yield Problem(f"path:{key}", f"{file!r} given, but there is no file {os.path.abspath(str(file))}")


def _write_problem(folder: Path) -> str | None:
    """Why a folder, which need not exist yet, cannot be written to."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return _write_problem(folder.parent)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"
