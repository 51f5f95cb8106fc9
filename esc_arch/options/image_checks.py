"""Checks of the images that a data set names: all there, in pairs, and of sizes that go together.

Sizes come from the lists of LMDBs, or from the headers of images in folders: before a run those of some, and nothing is
decoded; `basicsr check` takes the time for more, see `CheckScope`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from esc_arch.data.hr_images import HRImages, as_list
from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.data.lmdb_check import contents_of, listed_sizes, lmdb_problem
from esc_arch.data.names import read_names
from esc_arch.errors import UserError
from esc_arch.models.metrics import too_small
from esc_arch.printing import shown
from esc_arch.problems import Problem, wrong_value

from .files import Options
from .section_checks import CheckScope, lacks_memory

#: Of the order of an epoch, which BasicSR's sampler draws at once: a tensor, and a list of numbers.
_BYTES_PER_SAMPLE = 8 + 8 + 32

__all__ = ["HR_DATASETS", "ROOTS", "SizeRule", "backend_type", "check_images", "list_key"]

Size = tuple[int, int]  # height, width

#: Those that read HR images only, from one folder or LMDB or several, with the folders in them.
HR_DATASETS = ("ArbitraryScaleDataset", "DownsampleImageDataset")
#: The data sets whose images are checked, with the folders they read.
ROOTS = {
    "PairedImageDataset": ("dataroot_lq", "dataroot_gt"),
    "SingleImageDataset": ("dataroot_lq",),
    "RealESRGANDataset": ("dataroot_gt",),
    **dict.fromkeys(HR_DATASETS, ("dataroot_gt",)),
}

#: Of each data set: before a run, and by `basicsr check`, for which a header takes a tenth of a millisecond.
_IMAGES_MEASURED = 64
_IMAGES_MEASURED_AT_MOST = 4000
#: Of each LMDB, by `basicsr check`.
_IMAGES_DECODED = 16
_AGAIN = "Create it again: basicsr prepare"


@dataclass(frozen=True)
class SizeRule:
    """Which sizes of an LQ and a GT image go together.

    Attributes:
        scale: how many times larger GT is.
        is_train: GT must have exactly that size; otherwise BasicSR crops it.
        patch: the side of the patches cut from GT; None if whole images are used.
        metrics: what is measured of results, by name.
        patch_name: what the option file calls `patch`.
    """

    scale: int
    is_train: bool
    patch: int | None
    metrics: Mapping[str, Options]
    patch_name: str = "gt_size"

    def __str__(self) -> str:
        return f"scale {self.scale}" + (f" and {self.patch_name} {self.patch}" if self.patch is not None else "")

    def problem(self, sizes: Sequence[Size]) -> str | None:
        """What is wrong with the sizes of an LQ and a GT image, or of the only image."""
        lq, gt = sizes[0], sizes[-1]
        height, width = lq[0] * self.scale, lq[1] * self.scale
        fits = gt == (height, width) if self.is_train else gt[0] >= height and gt[1] >= width
        if len(sizes) > 1 and not fits:
            wanted = ("" if self.is_train else "at least ") + _shape((height, width))
            return f"LQ is {_shape(lq)} and GT {_shape(gt)}; with scale {self.scale} GT must be {wanted}"
        if self.patch is not None and min(gt) < self.patch:
            return f"GT is {_shape(gt)}, smaller than {self.patch_name} {self.patch}"
        for name, metric in self.metrics.items():
            if (reason := too_small(metric, height, width)) is not None:
                return f"its result will have {width}x{height} pixels; for val:metrics:{name}, {reason}"
        return None


def backend_type(dataset: Options) -> Any:
    backend = dataset.get("io_backend", {"type": "disk"})
    return backend.get("type") if isinstance(backend, dict) else ""


def list_key(dataset: Options) -> str:
    """What a data set calls its list of images."""
    return "meta_info" if dataset["type"].startswith("RealESRGAN") else "meta_info_file"


def check_images(path: str, dataset: Options, rule: SizeRule | None, scope: CheckScope) -> Iterator[Problem]:
    """There must be images, LQ and GT ones for each other, and, with a rule, of sizes that go together.

    Args:
        path: of the section of a data set in `ROOTS`, whose folders or LMDBs exist.
    """
    if backend_type(dataset) == "lmdb":
        sizes = yield from _sizes_in_lmdbs(path, dataset, scope)
        total = len(sizes)
    else:
        images = yield from _find_files(path, dataset)
        total = len(images)
        step = -(-total // (_IMAGES_MEASURED_AT_MOST if scope.thorough else _IMAGES_MEASURED))
        sizes = {}
        for files in images[:: max(1, step)] if rule else ():
            sizes[files[-1]] = [image_size(file) for file in files]
            for file, size in zip(files, sizes[files[-1]], strict=True):
                if size is None:
                    yield Problem(path, f"{file} cannot be read as an image; replace or remove it")
    if not total:
        return
    ratio = dataset.get("dataset_enlarge_ratio")
    if (
        path == "datasets:train"
        and isinstance(ratio, int | float)
        and (lack := lacks_memory(total * ratio * _BYTES_PER_SAMPLE))
    ):
        yield Problem(f"{path}:dataset_enlarge_ratio", f"{ratio} given, so that the order of an epoch takes {lack}")
    batch, samples = dataset.get("batch_size_per_gpu"), total * (ratio if isinstance(ratio, int | float) else 1)
    if path == "datasets:train" and isinstance(batch, int) and samples <= batch - 1:  # BasicSR rounds them up
        more = "Lower it, raise dataset_enlarge_ratio, or add images"
        yield Problem(f"{path}:batch_size_per_gpu", f"{samples:g} images, fewer than one batch of {batch}. {more}")
    # One problem for all images, since with a wrong scale every image has one
    wrong = [
        f"{name}: {problem}"
        for name, measured in sizes.items()
        if rule and None not in measured and (problem := rule.problem([size for size in measured if size]))
    ]
    if wrong:
        yield Problem(path, f"{len(wrong)} of {len(sizes)} images checked have a wrong size, the first is {wrong[0]}")
    elif len(ROOTS[dataset["type"]]) == 1:
        yield Problem(path, f"{total:,} images", "note")
    elif rule:
        share = "all sizes match" if len(sizes) == total else f"{len(sizes):,} sizes checked, all match"
        yield Problem(path, f"{total:,} pairs, {share} {rule}", "note")


def _find_files(path: str, dataset: Options) -> Generator[Problem, None, list[list[str]]]:
    """The files of each image, LQ before GT, as BasicSR has them; none if some are missing."""
    if dataset["type"] in HR_DATASETS:
        try:
            return [[file] for file in HRImages(dataset).paths]
        except UserError as error:
            yield Problem(path, str(error))
            return []
    *lq_key, key = ROOTS[dataset["type"]]
    list_file, root, template = dataset.get(list_key(dataset)), dataset[key], dataset.get("filename_tmpl", "{}")
    # RealESRGANDataset takes images, the others all files
    suffixes = IMAGE_SUFFIXES if dataset["type"] == "RealESRGANDataset" else ("",)
    names = _list_files(root, suffixes) if list_file is None else read_names(list_file)
    if not names:
        empty_list = Problem(f"{path}:{list_key(dataset)}", f"{list_file!r} cannot be used: it names no image")
        yield Problem(f"{path}:{key}", f"the folder {root!r} has no images") if list_file is None else empty_list
        return []
    columns = {key: [os.path.join(root, name) for name in names]}
    if lq_key:
        stems = [os.path.splitext(os.path.basename(name)) for name in names]
        try:
            lq_names = [template.format(stem) + extension for stem, extension in stems]
        except (AttributeError, IndexError, KeyError, ValueError):
            yield wrong_value(f"{path}:filename_tmpl", template, "text with {} for the GT's name, such as '{}x4'")
            return []
        lq_root = dataset["dataroot_lq"]
        columns = {"dataroot_lq": [os.path.join(lq_root, name) for name in lq_names]} | columns
        present = _list_files(lq_root) if list_file is None else []
        if len(present) > len(names):  # where there are fewer, some are missing
            where = f"{len(present)} files in {lq_root!r}, but {len(names)} in {root!r}"
            alone = min(set(present) - set(lq_names))
            yield Problem(path, f"{where}. There must be one LQ image for each GT image; {alone} has no GT image")
    problems = []
    for key, files in columns.items():
        # Listing a folder once is far quicker than asking for every file
        folders = filter(os.path.isdir, {os.path.dirname(file) for file in files})
        there = {(folder, name) for folder in folders for name in os.listdir(folder)}
        missing = [file for file in files if os.path.split(file) not in there]
        if missing:
            message = f"{len(missing)} of {len(files)} images are missing, the first is {shown(missing[0])}"
            of_pair = f" (filename_tmpl is {template!r})" if lq_key and key == "dataroot_lq" else ""
            problems.append(Problem(f"{path}:{key}", message + of_pair))
    yield from problems
    return [] if problems else list(map(list, zip(*columns.values(), strict=True)))


def _list_files(folder: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """The files in a folder that BasicSR takes for images: all but hidden ones, with one of these suffixes."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(name for name in files if name.lower().endswith(suffixes))


def image_size(file: str) -> Size | None:
    """Height and width as OpenCV reads them; None if it cannot."""
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # of images that Pillow finds suspiciously large
            width, height = image.size
            # OpenCV turns photographs upright. Only for JPEG is the orientation known without decoding.
            is_turned = image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (width, height) if is_turned else (height, width)
    except Exception:  # in all ways, of damaged headers; OpenCV, which will read it, may know better
        pass
    try:
        height, width, _ = read_image(Path(file)).shape
    except UserError:
        return None
    return height, width


def _sizes_in_lmdbs(
    path: str, dataset: Options, scope: CheckScope
) -> Generator[Problem, None, Mapping[str, Sequence[Size | None]]]:
    """The sizes of each image, LQ before GT, by its name; none if an LMDB is not as it should be."""
    roots = [(key, root) for key in ROOTS[dataset["type"]] for root in as_list(dataset[key])]
    problems = [problem for key, root in roots for problem in _check_lmdb(f"{path}:{key}", root, scope)]
    yield from problems
    if problems:
        return {}
    listed = [listed_sizes(root) for _, root in roots]
    if len(ROOTS[dataset["type"]]) == 1:
        return {
            f"{name} in {root}": [size]
            for (_, root), sizes in zip(roots, listed, strict=True)
            for name, size in sizes.items()
        }
    lq, gt = listed
    if odd := sorted(lq.keys() ^ gt.keys()):
        where = dataset["dataroot_gt" if odd[0] in lq else "dataroot_lq"]
        message = (
            f"{len(lq)} images in {dataset['dataroot_lq']!r} and {len(gt)} in {dataset['dataroot_gt']!r}, "
            f"{len(odd)} of them in one only; {odd[0]!r} is missing in {where!r}"
        )
        yield Problem(path, message)
        return {}
    return {name: [lq[name], gt[name]] for name in lq}


def _check_lmdb(path: str, folder: str, scope: CheckScope) -> Iterator[Problem]:
    """It must be whole; if thorough, its keys are compared with its list, and images from all over it are decoded."""
    missing = [name for name in ("data.mdb", "meta_info.txt") if not os.path.isfile(os.path.join(folder, name))]
    if not folder.endswith(".lmdb"):
        yield Problem(path, f"{folder!r} given; with io_backend type lmdb its name must end with .lmdb")
    elif missing:
        yield Problem(path, f"{folder!r} is not a whole LMDB: it has no {' and no '.join(missing)}. {_AGAIN}")
    elif not (listed := listed_sizes(folder)):
        yield Problem(path, f"{folder!r} has no images: its meta_info.txt is empty. {_AGAIN}")
    elif scope.thorough and (problem := lmdb_problem(folder)) is not None:  # reading on could end the process
        yield Problem(path, f"{folder!r} is damaged: {problem}. {_AGAIN}")
    elif scope.thorough:
        found = contents_of(folder, listed, _IMAGES_DECODED)
        differences = {
            f"of the {len(listed)} images that {folder!r} lists in meta_info.txt are missing": found.missing,
            f"of the {found.keys} images in {folder!r} are not in its meta_info.txt": found.unlisted,
        }
        for what, keys in differences.items():
            if keys:
                yield Problem(path, f"{len(keys)} {what}, the first is {keys[0]!r}. {_AGAIN}")
        for key, problem in found.bad.items():
            yield Problem(path, f"{key!r} in {folder!r} {problem}. {_AGAIN}")


def _shape(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
