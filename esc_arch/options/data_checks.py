"""Checks of the sections of `datasets:`: what they name must exist, belong together and have the right sizes.

Only BasicSR's data sets and ours are looked into; of others only the folders are looked for.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from basicsr.utils.file_client import FileClient

from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.data.hr_images import as_list
from esc_arch.names import did_you_mean
from esc_arch.problems import Problem, wrong_value

from .files import Options
from .image_checks import HR_DATASETS, ROOTS, SizeRule, backend_type, check_images, list_key
from .section_checks import CheckScope, is_integer, is_known_code

__all__ = ["check_data", "missing_data"]

#: Commands that make data, by the paths that they give them.
_COMMANDS = {
    r"datasets/demo/.+": "basicsr prepare demo",
    r"(?P<out>.+)/(?P<name>[^/]+)_(HR|LR_bicubic_X\d+)_sub\.lmdb": (
        "basicsr prepare train -i FOLDER -o {out} --name {name}"
    ),
    r"(?P<out>.+)/(?P<each>[^/]+)/(HR|LR_bicubic/X\d+)": "basicsr prepare benchmark -i FOLDER/{each} -o {out}/{each}",
}


def missing_data(problems: Sequence[Problem]) -> tuple[list[Problem], list[str]]:
    """Problems without those of missing data that `basicsr prepare` makes; lines about all these, with the commands."""
    commands: dict[str, dict[str, None]] = {}
    found: list[Problem] = []
    for problem in problems:
        for pattern, command in _COMMANDS.items():
            if match := re.fullmatch(pattern, problem.missing or ""):
                names = {key: shlex.quote(text) for key, text in match.groupdict().items()}
                each = names.pop("each", "")
                commands.setdefault(command.format(**names, each="$NAME"), {})[each] = None
                found.append(problem)
                break
    if not found:
        return list(problems), []
    first = os.path.abspath(str(found[0].missing))
    lines = [
        f"Missing: {len({problem.missing for problem in found})} folders or LMDBs of images, the first is {first}. "
        "Make them, FOLDER being where your HR images are:",
        *(
            f"  for NAME in {' '.join(names)}; do {command}; done" if "$NAME" in command else f"  {command}"
            for command, names in commands.items()
        ),
        "or remove their sections of the option file. basicsr check --no-data checks the rest of it.",
    ]
    return [problem for problem in problems if problem not in found], lines


def check_data(
    path: str, dataset: Options, kind: type, scale: Any, metrics: Mapping[str, Options], scope: CheckScope
) -> Iterator[Problem]:
    """What is wrong with the data of `dataset`, the section at `path` of a data set of class `kind`.

    `metrics` are those of validation, by name; without them, the size of GT does not matter there.
    """
    if not is_known_code(kind):
        if scope.with_files:
            yield from _check_roots_exist(path, dataset)
        return
    dataset = dataset | {"type": kind.__name__}  # it may be given as esc_arch.NAME
    is_train = path == "datasets:train"
    problems = list(_check_section(path, dataset))
    if scope.with_files:
        problems += [*_check_roots_exist(path, dataset), *_check_list_exists(path, dataset)]
    if is_train:
        problems += _check_gt_size(path, dataset, scale)
    if option_problems := getattr(kind, "option_problems", None):  # a data set that has options of its own
        found = option_problems(dataset | {"phase": "train" if is_train else "val"})
        problems += [replace(problem, path=f"{path}:{problem.path}") for problem in found]
    elif dataset["type"] in ("PairedImageDataset", *HR_DATASETS) and not is_integer(scale, least=1):
        problems.append(wrong_value("scale", scale, f"a positive integer: {path} needs it"))
    yield from problems
    if not problems and scope.with_files and dataset["type"] in ROOTS:
        yield from check_images(path, dataset, _size_rule(dataset, is_train, scale, metrics), scope)


def _check_section(path: str, dataset: Options) -> Iterator[Problem]:
    backend, name = str(backend_type(dataset)), dataset["type"]
    if backend not in FileClient._backends:
        known = f"a mapping with a known type. {did_you_mean(backend, FileClient._backends)}"
        yield wrong_value(f"{path}:io_backend", dataset["io_backend"], known)
    takes_several = name in HR_DATASETS
    for key in ROOTS.get(name, ()):
        roots = as_list(dataset.get(key)) if takes_several else [dataset.get(key)]
        if not roots or not all(isinstance(root, str) for root in roots):
            several = ", or a list of them" if takes_several else ""
            yield wrong_value(f"{path}:{key}", dataset.get(key), f"a folder or an LMDB{several}: {name} needs it")
    if name in ROOTS and not takes_several and not isinstance(dataset.get(list_key(dataset)), str | None):
        wanted = "a text file with one image's name in each line"
        yield wrong_value(f"{path}:{list_key(dataset)}", dataset[list_key(dataset)], wanted)


def _check_roots_exist(path: str, dataset: Options) -> Iterator[Problem]:
    if backend_type(dataset) not in ("disk", "lmdb"):  # paths may mean something else there
        return
    for key, value in dataset.items():
        for root in as_list(value) if key.startswith("dataroot") else ():
            if isinstance(root, str) and not os.path.exists(root):
                yield Problem(f"{path}:{key}", f"{root!r} given, but there is no {os.path.abspath(root)}", missing=root)


def _check_list_exists(path: str, dataset: Options) -> Iterator[Problem]:
    if dataset["type"] in ROOTS and backend_type(dataset) == "lmdb":  # it has a list of its own, and no other is read
        return
    key = list_key(dataset)
    for file in as_list(dataset.get(key)):
        if isinstance(file, str) and not os.path.isfile(file):
            omit = f" Remove {key} to use all images of the folders." if dataset["type"] in ROOTS else ""
            message = (
                f"{file!r} given, but there is no file {os.path.abspath(file)}.{omit} BasicSR's own lists "
                "(basicsr/data/meta_info) come with a clone of BasicSR only: copy the file from there"
            )
            yield Problem(f"{path}:{key}", message)


def _check_gt_size(path: str, dataset: Options, scale: Any) -> Iterator[Problem]:
    size = dataset.get("gt_size")
    if size is None and dataset["type"] not in ("PairedImageDataset", "DownsampleImageDataset"):
        return
    if not is_integer(size, least=1):
        yield wrong_value(f"{path}:gt_size", size, "a positive integer: the side of the patches cut from GT")
    elif is_integer(scale, least=1) and size % scale:
        near = [n for n in (size // scale * scale, (size // scale + 1) * scale) if n]
        wanted = f"divisible by scale {scale}: use {' or '.join(map(str, near))}"
        yield wrong_value(f"{path}:gt_size", size, wanted)


def _size_rule(dataset: Options, is_train: bool, scale: Any, metrics: Mapping[str, Options]) -> SizeRule | None:
    """Which sizes the images of a data set must have, if it matters."""
    kind = dataset["type"]
    if is_train and kind == "ArbitraryScaleDataset":
        return SizeRule(1, True, ScaleRange.of(dataset).hr_size, {}, patch_name="lq_size * scale_max")
    if is_train and kind in ("PairedImageDataset", "DownsampleImageDataset"):
        return SizeRule(scale, True, dataset["gt_size"], {})
    if not is_train and metrics and kind not in HR_DATASETS and is_integer(scale, least=1):
        return SizeRule(scale, False, None, metrics)
    return None
