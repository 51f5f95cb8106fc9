"""Checks of the images that a data set names: all there, in pairs, and of sizes that go together.

Sizes come from the lists of LMDBs, or from the headers of images in folders: before a run those of some, and nothing is
decoded; `basicsr check` takes the time for more, see `CheckScope`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags, Image

from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.data.hr_images import HRImages, as_list
from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.data.lmdb_check import contents_of, listed_sizes, lmdb_problem
from esc_arch.data.names import read_names, shown
from esc_arch.errors import UserError
from esc_arch.models.metrics import too_small
from esc_arch.problems import Problem

from .files import Options

__all__ = [
    "HR_DATASETS",
    "ROOTS",
    "CheckScope",
    "SizeRule",
    "backend_type",
    "check_hr_images",
    "check_images",
    "list_key",
]

Size = tuple[int, int]  # height, width
Item = TypeVar("Item")

#: The data sets whose images are checked, with the folders they read.
ROOTS = {
    "PairedImageDataset": ("dataroot_lq", "dataroot_gt"),
    "SingleImageDataset": ("dataroot_lq",),
    "RealESRGANDataset": ("dataroot_gt",),
}
#: Those that read HR images only, from one folder or LMDB or several.
HR_DATASETS = ("ArbitraryScaleDataset", "DownsampleImageDataset")

#: Of each data set: before a run, and by `basicsr check`, for which a header takes a tenth of a millisecond.
_IMAGES_MEASURED = 64
_IMAGES_MEASURED_AT_MOST = 4000
#: Of each LMDB, by `basicsr check`.
_IMAGES_DECODED = 16
_AGAIN = "Create it again: basicsr prepare"


@dataclass(frozen=True)
class CheckScope:
    """How much of what an option file names is checked.

    Attributes:
        thorough: the sizes of up to 4,000 pairs of each data set instead of 64; what is in LMDBs and not only their
            lists; networks of other packages that cannot be built without memory.
        with_files: the data, weights and GPUs that the file names, too.
    """

    thorough: bool = False
    with_files: bool = True

    def sample(self, items: list[Item]) -> list[Item]:
        """Those of the items, of which there is one for each image, that are measured: from all over the list."""
        most = _IMAGES_MEASURED_AT_MOST if self.thorough else _IMAGES_MEASURED
        return items[:: max(1, -(-len(items) // most))]


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
    """What a data set of `ROOTS` calls its list of images."""
    return "meta_info" if dataset["type"] == "RealESRGANDataset" else "meta_info_file"


def check_images(path: str, dataset: Options, rule: SizeRule | None, scope: CheckScope) -> Iterator[Problem]:
    """There must be images, LQ and GT ones for each other, and, with a rule, of sizes that go together."""
    keys = ROOTS[dataset["type"]]
    if backend_type(dataset) == "lmdb":
        yield from _check_lmdbs(path, {key: dataset[key] for key in keys}, rule, scope)
        return
    if (list_file := dataset.get(list_key(dataset))) is not None:
        names = dict.fromkeys(keys, read_names(list_file))
        if not names[keys[-1]]:
            yield Problem(f"{path}:{list_key(dataset)}", f"{list_file!r} cannot be used: it names no image")
    else:
        suffixes, what = (IMAGE_SUFFIXES, "images") if dataset["type"] == "RealESRGANDataset" else (("",), "files")
        names = {key: _list_files(dataset[key], suffixes) for key in keys}
        for key in keys:
            if not names[key]:
                yield Problem(f"{path}:{key}", f"the folder {dataset[key]!r} has no {what}")
    if not all(names.values()):
        return
    try:
        images = [_files(dataset, name) for name in names[keys[-1]]]
    except (AttributeError, IndexError, KeyError, ValueError):
        message = f"{dataset.get('filename_tmpl')!r} given; must be text with {{}} for the GT's name, such as '{{}}x4'"
        yield Problem(f"{path}:filename_tmpl", message)
        return
    missing = list(_check_existence(path, dataset, images))
    yield from missing
    lq, gt = names[keys[0]], names[keys[-1]]
    if len(lq) > len(gt):  # where there are fewer, some are missing
        alone = min(set(lq) - {os.path.basename(file) for file, _ in images})
        where = f"{len(lq)} files in {dataset['dataroot_lq']!r}, but {len(gt)} in {dataset['dataroot_gt']!r}"
        yield Problem(path, f"{where}. There must be one LQ image for each GT image; {alone} has no GT image")
    if not missing:
        yield from _check_headers(path, images, rule, scope)


def _list_files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files BasicSR takes for images: all but hidden ones, of RealESRGANDataset those with an image's suffix."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(name for name in files if name.lower().endswith(suffixes))


def _files(dataset: Options, name: str) -> list[str]:
    """The file, or the LQ and the GT file, of an image by its name in the list or the GT folder, as BasicSR has it."""
    *lq_key, last = ROOTS[dataset["type"]]
    files = [os.path.join(dataset[last], name)]
    if lq_key:
        stem, extension = os.path.splitext(os.path.basename(name))
        lq_name = dataset.get("filename_tmpl", "{}").format(stem) + extension
        files.insert(0, os.path.join(dataset["dataroot_lq"], lq_name))
    return files


def _check_existence(path: str, dataset: Options, images: list[list[str]]) -> Iterator[Problem]:
    @functools.cache  # listing a folder once is far quicker than asking for every file
    def names_in(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    for key, files in zip(ROOTS[dataset["type"]], zip(*images, strict=True), strict=True):
        missing = [file for file in files if os.path.basename(file) not in names_in(os.path.dirname(file))]
        if missing:
            template = f" (filename_tmpl is {dataset.get('filename_tmpl', '{}')!r})"
            message = f"{len(missing)} of {len(images)} images are missing, the first is {shown(missing[0])}"
            is_lq_of_pair = key == "dataroot_lq" and len(images[0]) > 1
            yield Problem(f"{path}:{key}", message + template * is_lq_of_pair)


def _check_headers(path: str, images: list[list[str]], rule: SizeRule | None, scope: CheckScope) -> Iterator[Problem]:
    sizes = {}
    for files in scope.sample(images) if rule else ():
        sizes[files[-1]] = [image_size(file) for file in files]
        for file, size in zip(files, sizes[files[-1]], strict=True):
            if size is None:
                yield Problem(path, f"{file} cannot be read as an image; replace or remove it")
    yield from _check_sizes(path, sizes, len(images), rule, is_paired=len(images[0]) > 1)


def _check_sizes(
    path: str, sizes: Mapping[str, Sequence[Size | None]], total: int, rule: SizeRule | None, is_paired: bool
) -> Iterator[Problem]:
    """One problem for all images, since with a wrong scale every image has one; or what was checked of how many.

    `sizes` are those of LQ and GT, or of the only image, by name: None where not known.
    """
    wrong = []
    for name, measured in sizes.items():
        known = [size for size in measured if size is not None]
        if rule and len(known) == len(measured) and (problem := rule.problem(known)):
            wrong.append(f"{name}: {problem}")
    if wrong:
        yield Problem(path, f"{len(wrong)} of {len(sizes)} images checked have a wrong size, the first is {wrong[0]}")
    elif not is_paired:
        yield Problem(path, f"{total:,} images", "note")
    elif rule:
        share = "all sizes match" if len(sizes) == total else f"{len(sizes):,} sizes checked, all match"
        yield Problem(path, f"{total:,} pairs, {share} {rule}", "note")


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


def _check_lmdbs(path: str, roots: dict[str, str], rule: SizeRule | None, scope: CheckScope) -> Iterator[Problem]:
    problems = [problem for key, folder in roots.items() for problem in _check_lmdb_folder(f"{path}:{key}", folder)]
    yield from problems
    if problems:
        return
    listed = [listed_sizes(folder) for folder in roots.values()]
    if scope.thorough:
        for (key, folder), sizes in zip(roots.items(), listed, strict=True):
            yield from _check_lmdb_content(f"{path}:{key}", folder, sizes)
    lq, gt = listed[0], listed[-1]
    if odd := sorted(lq.keys() ^ gt.keys()):
        where = roots["dataroot_gt" if odd[0] in lq else "dataroot_lq"]
        message = (
            f"{len(lq)} images in {roots['dataroot_lq']!r} and {len(gt)} in {roots['dataroot_gt']!r}, "
            f"{len(odd)} of them in one only; {odd[0]!r} is missing in {where!r}"
        )
        yield Problem(path, message)
        return
    images = {name: [sizes[name] for sizes in listed] for name in lq}
    yield from _check_sizes(path, images, len(images), rule, is_paired=len(roots) > 1)


def _check_lmdb_folder(path: str, folder: str) -> Iterator[Problem]:
    missing = [name for name in ("data.mdb", "meta_info.txt") if not os.path.isfile(os.path.join(folder, name))]
    if not folder.endswith(".lmdb"):
        yield Problem(path, f"{folder!r} given; with io_backend type lmdb its name must end with .lmdb")
    elif missing:
        yield Problem(path, f"{folder!r} is not a whole LMDB: it has no {' and no '.join(missing)}. Create it again")
    elif not listed_sizes(folder):
        yield Problem(path, f"{folder!r} has no images: its meta_info.txt is empty. Create it again")


def _check_lmdb_content(path: str, folder: str, listed: Mapping[str, Size | None]) -> Iterator[Problem]:
    """All keys are compared with the list meta_info.txt; a few images from all over it are decoded."""
    if (problem := lmdb_problem(folder)) is not None:  # reading on could end the process
        yield Problem(path, f"{folder!r} is damaged: {problem}. {_AGAIN}")
        return
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


def check_hr_images(path: str, dataset: Options, is_train: bool, scope: CheckScope) -> Iterator[Problem]:
    """There must be images under each root, and, for training, patches must fit into them."""
    try:
        images = HRImages(dataset)
    except UserError as error:
        yield Problem(path, str(error))
        return
    rule = None
    if is_train and dataset["type"] == "ArbitraryScaleDataset":
        rule = SizeRule(1, True, ScaleRange.of(dataset).hr_size, {}, patch_name="lq_size * scale_max")
    elif is_train:
        rule = SizeRule(1, True, dataset["gt_size"], {})
    if backend_type(dataset) != "lmdb":
        yield from _check_headers(path, [[file] for file in images.paths], rule, scope)
        return
    sizes: dict[str, list[Size | None]] = {}
    for root in as_list(dataset["dataroot_gt"]):
        listed = listed_sizes(root)
        sizes |= {f"{key} in {root}": [size] for key, size in listed.items()}
        if scope.thorough:
            yield from _check_lmdb_content(f"{path}:dataroot_gt", root, listed)
    yield from _check_sizes(path, sizes, len(images), rule, is_paired=False)


def _shape(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
