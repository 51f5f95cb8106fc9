"""Checks of the sections of `datasets:`: what they name must exist, belong together and have the right sizes.

Only BasicSR's data sets and ours are looked into; of others only the folders are looked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from basicsr.utils.file_client import FileClient

from esc_arch.data.hr_images import as_list
from esc_arch.names import did_you_mean
from esc_arch.problems import Problem

from .files import Options
from .image_checks import (
    HR_DATASETS,
    ROOTS,
    CheckScope,
    SizeRule,
    backend_type,
    check_hr_images,
    check_images,
    list_key,
)
from .section_checks import is_integer, is_known_code

__all__ = ["CheckScope", "check_data"]


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
    problems = [*_check_backend(path, dataset), *_check_roots(path, dataset)]
    if scope.with_files:
        problems += [*_check_roots_exist(path, dataset), *_check_list_file(path, dataset)]
    if is_train:
        problems += _check_gt_size(path, dataset, scale)
    if option_problems := getattr(kind, "option_problems", None):  # a data set that has options of its own
        found = option_problems(dataset | {"phase": "train" if is_train else "val"})
        problems += [replace(problem, path=f"{path}:{problem.path}") for problem in found]
    elif dataset["type"] in ("PairedImageDataset", *HR_DATASETS) and not is_integer(scale, least=1):
        problems.append(Problem("scale", f"{scale!r} given; must be a positive integer: {path} needs it"))
    yield from problems
    if problems or not scope.with_files:
        return
    if dataset["type"] in HR_DATASETS:
        yield from check_hr_images(path, dataset, is_train, scope)
    elif dataset["type"] in ROOTS:
        rule = None
        if is_train and dataset["type"] == "PairedImageDataset":
            rule = SizeRule(scale, True, dataset["gt_size"], {})
        elif metrics and not is_train and is_integer(scale, least=1):
            rule = SizeRule(scale, False, None, metrics)
        yield from check_images(path, dataset, rule, scope)


def _check_backend(path: str, dataset: Options) -> Iterator[Problem]:
    kind = str(backend_type(dataset))
    if kind not in FileClient._backends:
        message = f"{dataset['io_backend']!r} given; must have a known type. {did_you_mean(kind, FileClient._backends)}"
        yield Problem(f"{path}:io_backend", message)


def _check_roots(path: str, dataset: Options) -> Iterator[Problem]:
    for key in ROOTS.get(dataset["type"], ()):
        if not isinstance(dataset.get(key), str):
            yield Problem(f"{path}:{key}", f"{dataset.get(key)!r} given; {dataset['type']} needs a folder here")
    if dataset["type"] in HR_DATASETS:
        given = dataset.get("dataroot_gt")
        if not as_list(given) or not all(isinstance(root, str) for root in as_list(given)):
            yield Problem(f"{path}:dataroot_gt", f"{given!r} given; must be a folder, an LMDB or several")


def _check_roots_exist(path: str, dataset: Options) -> Iterator[Problem]:
    if backend_type(dataset) not in ("disk", "lmdb"):  # paths may mean something else there
        return
    for key, value in dataset.items():
        for root in as_list(value) if key.startswith("dataroot") else ():
            if isinstance(root, str) and not os.path.exists(root):
                yield Problem(f"{path}:{key}", f"{root!r} given, but there is no {os.path.abspath(root)}")


def _check_list_file(path: str, dataset: Options) -> Iterator[Problem]:
    is_optional = dataset["type"] in (*ROOTS, *HR_DATASETS)
    if is_optional and backend_type(dataset) == "lmdb":  # it has a list of its own, and no other is read
        return
    own = list_key(dataset)
    if dataset["type"] in ROOTS and not isinstance(dataset.get(own), str | None):
        message = f"{dataset[own]!r} given; must be a text file with one image's name in each line"
        yield Problem(f"{path}:{own}", message)
    for key in (own,) if dataset["type"] in ROOTS else ("meta_info_file", "meta_info"):
        for file in as_list(dataset.get(key)):
            if isinstance(file, str) and not os.path.isfile(file):
                omit = f" Remove {key} to use all images of the folders." if is_optional else ""
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
        message = f"{size!r} given; must be a positive integer: the side of the patches cut from GT"
        yield Problem(f"{path}:gt_size", message)
    elif is_integer(scale, least=1) and size % scale:
        near = [n for n in (size // scale * scale, (size // scale + 1) * scale) if n]
        message = f"{size} given; must be divisible by scale {scale}: use {' or '.join(map(str, near))}"
        yield Problem(f"{path}:gt_size", message)
