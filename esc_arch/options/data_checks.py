"""Whether the images that an option file names are there, belong together and have the right sizes.

Only BasicSR's datasets and ours are looked into; of others only the folders are looked for. Sizes come from
the lists of LMDBs, or from the headers of images in folders: before a run those of the first, and nothing is
decoded; `basicsr check` looks at more, see `CheckScope`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from basicsr.utils.file_client import FileClient
from PIL import Image

from esc_arch.data.arbitrary_scale_dataset import ScaleRange
from esc_arch.data.decoding import reason_against
from esc_arch.data.hr_images import HRImages, as_list
from esc_arch.data.image_files import IMAGE_SUFFIXES
from esc_arch.data.lmdb_check import listed_sizes
from esc_arch.data.name_lists import read_names
from esc_arch.data.names import shown
from esc_arch.errors import UserError
from esc_arch.models.metrics import too_small
from esc_arch.suggestions import did_you_mean

from .files import Options
from .lmdb_checks import check_content

__all__ = ["CheckScope", "check_data"]

Size = tuple[int, int]  # height, width

#: Of each data set: before a run, and by `basicsr check`, for which a header takes a tenth of a millisecond.
_IMAGES_MEASURED = 64
_IMAGES_MEASURED_AT_MOST = 4000
_TEMPLATE_ERRORS = (AttributeError, IndexError, KeyError, ValueError)
_EXIF_ORIENTATION = 0x0112
_FIRST_TRANSPOSED_ORIENTATION = 5
# The datasets whose images are looked at, with the folders they read.
_ROOTS_READ = {
    "PairedImageDataset": ("dataroot_lq", "dataroot_gt"),
    "SingleImageDataset": ("dataroot_lq",),
    "RealESRGANDataset": ("dataroot_gt",),
}
# Those that read HR images only, from one folder or LMDB or several.
_HR_DATASETS = ("ArbitraryScaleDataset", "DownsampleImageDataset")


@dataclass
class CheckScope:
    """How much of what an option file names is looked at.

    Attributes:
        thorough: the sizes of up to 4,000 pairs of each data set, spread evenly, instead of the first 64; what is in
            LMDBs and not only their lists; networks of other packages that cannot be built without memory.
        with_files: whether the data, weights and GPUs that the file names are looked for at all.
        facts: what was compared with what is put here, a sentence each.
        warnings: what is allowed and may not be meant, in the form of problems.
    """

    thorough: bool = False
    with_files: bool = True
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def chosen(self, items: list[Any]) -> list[Any]:
        """Those of the items, of which there is one for each image, that are to be looked at."""
        if not self.thorough:
            return items[:_IMAGES_MEASURED]
        return items[:: max(1, -(-len(items) // _IMAGES_MEASURED_AT_MOST))]


@dataclass(frozen=True)
class _SizeRule:
    """Which sizes of an LQ and a GT image go together."""

    scale: int
    is_train: bool
    gt_size: int | None
    """The side of the patches cut from GT; None when whole images are used."""
    gt_size_name: str = "gt_size"
    """What the option file calls it."""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What is measured of results, by name."""

    def __str__(self) -> str:
        patches = f" and {self.gt_size_name} {self.gt_size}" if self.gt_size is not None else ""
        return f"scale {self.scale}{patches}"

    def problem(self, lq: Size, gt: Size) -> str | None:
        wanted = lq[0] * self.scale, lq[1] * self.scale
        # Outside training BasicSR crops GT to this size.
        fits = gt == wanted if self.is_train else gt[0] >= wanted[0] and gt[1] >= wanted[1]
        if not fits:
            bound = "" if self.is_train else "at least "
            return f"LQ is {_shape(lq)} and GT {_shape(gt)}; with scale {self.scale} GT must be {bound}{_shape(wanted)}"
        if self.gt_size is not None and min(gt) < self.gt_size:
            return f"GT is {_shape(gt)}, smaller than {self.gt_size_name} {self.gt_size}"
        return self.unmeasurable(lq)

    def unmeasurable(self, lq: Size) -> str | None:
        """Why a metric is not defined for the result for an LQ image."""
        height, width = lq[0] * self.scale, lq[1] * self.scale
        for name, metric in self.metrics.items():
            if (reason := too_small(metric, height, width)) is not None:
                return f"its result will have {width}x{height} pixels; for val:metrics:{name}, {reason}"
        return None


def check_data(
    path: str, dataset: Options, kind: type, *, scale: Any, metrics: Mapping[str, Options], extent: CheckScope
) -> Iterator[str]:
    """All that is wrong with the data of `dataset`, an instance of `kind` to be, at `path` in the option file.

    `metrics` are those of validation, by name; without them, the size of GT does not matter there.
    """
    if kind.__module__.split(".")[0] not in ("basicsr", "esc_arch"):
        if extent.with_files:
            yield from _check_that_roots_exist(path, dataset)
        return
    dataset = dataset | {"type": kind.__name__}  # it may be given as esc_arch.NAME
    is_train, is_paired = path == "datasets:train", dataset["type"] == "PairedImageDataset"
    problems = [*_check_backend(path, dataset), *_check_roots(path, dataset)]
    if extent.with_files:
        problems += [*_check_that_roots_exist(path, dataset), *_check_list_file(path, dataset)]
    if is_train:
        problems += _check_gt_size(path, dataset, scale)
    if problems_of := getattr(kind, "option_problems", None):  # a data set that has options of its own
        phase = "train" if is_train else "val"
        problems += [f"{path}:{problem}" for problem in problems_of(dataset | {"phase": phase})]
    elif (is_paired or dataset["type"] in _HR_DATASETS) and not _is_positive(scale):
        problems.append(f"scale: {scale!r} given; must be a positive integer: {path} needs it")
    yield from problems
    if problems or not extent.with_files:
        return
    if dataset["type"] in _HR_DATASETS:
        yield from _check_hr_images(path, dataset, is_train, extent)
    elif dataset["type"] in _ROOTS_READ:
        rule = None
        if _is_positive(scale) and (metrics or is_train):
            gt_size = dataset.get("gt_size") if is_train else None
            rule = _SizeRule(scale, is_train, gt_size, metrics={} if is_train else metrics)
        yield from _check_images(path, dataset, rule, extent)


def _check_backend(path: str, dataset: Options) -> Iterator[str]:
    backend = dataset.get("io_backend", {"type": "disk"})
    kind = str(backend.get("type")) if isinstance(backend, dict) else ""
    known = FileClient._backends
    if kind not in known:
        yield f"{path}:io_backend: {backend!r} given; must have a known type. {did_you_mean(kind, known)}"
    elif kind == "lmdb" and find_spec("lmdb") is None:
        yield f"{path}:io_backend:type: lmdb needs the package lmdb, which is not installed: pip install lmdb"


def _check_roots(path: str, dataset: Options) -> Iterator[str]:
    for key in _ROOTS_READ.get(dataset["type"], ()):
        if not isinstance(dataset.get(key), str):
            yield f"{path}:{key}: {dataset.get(key)!r} given; {dataset['type']} needs a folder here"
    if dataset["type"] in _HR_DATASETS:
        roots = as_list(dataset.get("dataroot_gt"))
        if not roots or not all(isinstance(root, str) for root in roots):
            yield f"{path}:dataroot_gt: {dataset.get('dataroot_gt')!r} given; must be a folder, an LMDB or several"


def _check_that_roots_exist(path: str, dataset: Options) -> Iterator[str]:
    if _backend(dataset) not in ("disk", "lmdb"):  # paths may mean something else there
        return
    for key, value in dataset.items():
        for root in _texts(value) if key.startswith("dataroot") else ():
            if not os.path.exists(root):
                yield (
                    f"{path}:{key}: {root!r} given, but there is no {os.path.abspath(root)}. "
                    "Relative paths start in the current folder"
                )


def _check_list_file(path: str, dataset: Options) -> Iterator[str]:
    can_do_without = dataset["type"] in (*_ROOTS_READ, *_HR_DATASETS)
    if can_do_without and _backend(dataset) == "lmdb":  # it has a list of its own, and no other is read
        return
    own = _list_key(dataset)
    if dataset["type"] in _ROOTS_READ and not isinstance(dataset.get(own), str | None):
        yield f"{path}:{own}: {dataset[own]!r} given; must be a text file with one image's name in each line"
    for key in (own,) if dataset["type"] in _ROOTS_READ else ("meta_info_file", "meta_info"):
        for file in _texts(dataset.get(key)):
            if not os.path.isfile(file):
                leave_out = f" Remove {key} to use all images of the folders." if can_do_without else ""
                yield (
                    f"{path}:{key}: {file!r} given, but there is no file {os.path.abspath(file)}.{leave_out} BasicSR's "
                    "own lists (basicsr/data/meta_info) come with a clone of BasicSR only: copy the file from there"
                )


def _list_key(dataset: Options) -> str:
    """What a data set of `_ROOTS_READ` calls its list of images."""
    return "meta_info" if dataset["type"] == "RealESRGANDataset" else "meta_info_file"


def _check_gt_size(path: str, dataset: Options, scale: Any) -> Iterator[str]:
    size = dataset.get("gt_size")
    if size is None and dataset["type"] not in ("PairedImageDataset", "DownsampleImageDataset"):
        return
    if not _is_positive(size):
        yield f"{path}:gt_size: {size!r} given; must be a positive integer: the side of the patches cut from GT"
    elif _is_positive(scale) and size % scale:
        near = [n for n in (size // scale * scale, (size // scale + 1) * scale) if n]
        yield f"{path}:gt_size: {size} given; must be divisible by scale {scale}: use {' or '.join(map(str, near))}"


def _check_images(path: str, dataset: Options, rule: _SizeRule | None, extent: CheckScope) -> Iterator[str]:
    """Whether there are images, LQ and GT ones for each other, and, with a rule, of sizes that go together."""
    folders = {key: dataset[key] for key in _ROOTS_READ[dataset["type"]]}
    if _backend(dataset) == "lmdb":
        yield from _check_lmdbs(path, folders, rule, extent)
    elif dataset.get(_list_key(dataset)) is not None:
        yield from _check_listed_images(path, dataset, folders, rule, extent)
    else:
        suffixes = IMAGE_SUFFIXES if dataset["type"] == "RealESRGANDataset" else ("",)
        images = {
            key: [name for name in _list_images(folder) if name.lower().endswith(suffixes)]
            for key, folder in folders.items()
        }
        empty = [key for key, names in images.items() if not names]
        for key in empty:
            yield f"{path}:{key}: the folder {folders[key]!r} has no {'files' if suffixes == ('',) else 'images'}"
        if not empty and len(folders) > 1:
            yield from _check_folders(path, dataset, images["dataroot_lq"], images["dataroot_gt"], rule, extent)
        elif not empty:
            ((key, names),) = images.items()
            yield from _check_single_images(path, [os.path.join(folders[key], name) for name in names], rule, extent)


def _check_hr_images(path: str, dataset: Options, is_train: bool, extent: CheckScope) -> Iterator[str]:
    """Whether there are images under each root, and, for training, whether patches can be cut from them."""
    try:
        images = HRImages(dataset)
    except UserError as error:
        yield f"{path}: {error}"
        return
    extent.facts.append(f"{path}: {len(images):,} images")
    sizes: dict[str, Size | None] = {}
    if _backend(dataset) == "lmdb":
        for root in as_list(dataset["dataroot_gt"]):
            of_root = listed_sizes(root)
            sizes |= {f"{key} in {root}": size for key, size in of_root.items()}
            if extent.thorough:
                yield from check_content(f"{path}:dataroot_gt", root, of_root)
    if not is_train:
        return
    if _backend(dataset) != "lmdb":  # from all over the list, so that each root has its share
        most = _IMAGES_MEASURED_AT_MOST if extent.thorough else _IMAGES_MEASURED
        sizes = {file: _image_size(file) for file in images.paths[:: -(-len(images) // most)]}
        for file in [file for file, size in sizes.items() if size is None]:
            yield f"{path}: {file} cannot be read as an image; replace or remove it"
    if dataset["type"] == "ArbitraryScaleDataset":
        rule = _SizeRule(1, True, ScaleRange.of(dataset).hr_size, "lq_size * scale_max")
    else:
        rule = _SizeRule(1, True, dataset["gt_size"])
    yield from _summary(path, [(file, rule.problem(size, size)) for file, size in sizes.items() if size])


def _list_images(folder: str) -> list[str]:
    """The files BasicSR takes for images: all but hidden ones."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())


def _check_folders(
    path: str, dataset: Options, lq: list[str], gt: list[str], rule: _SizeRule | None, extent: CheckScope
) -> Iterator[str]:
    if len(lq) != len(gt):
        yield (
            f"{path}: {len(lq)} files in {dataset['dataroot_lq']!r}, but {len(gt)} in {dataset['dataroot_gt']!r}. "
            f"There must be one LQ image for each GT image{_without_partner(dataset, lq, gt)}"
        )
    yield from _check_pairs(path, dataset, gt, rule, extent)


def _without_partner(dataset: Options, lq: list[str], gt: list[str]) -> str:
    """Names an LQ image for which there is no GT image, if that is why there are too many."""
    try:
        wanted = {os.path.basename(_pair(dataset, name, dataset.get("filename_tmpl", "{}"))[0]) for name in gt}
    except _TEMPLATE_ERRORS:
        return ""
    alone = [name for name in lq if name not in wanted]
    return f"; {alone[0]} has no GT image" if alone and len(lq) > len(gt) else ""


def _check_listed_images(
    path: str, dataset: Options, folders: dict[str, str], rule: _SizeRule | None, extent: CheckScope
) -> Iterator[str]:
    key = _list_key(dataset)
    names = read_names(dataset[key])
    if not names:
        yield f"{path}:{key}: {dataset[key]!r} cannot be used: it names no image"
    elif len(folders) > 1:
        yield from _check_pairs(path, dataset, names, rule, extent)
    else:
        ((root_key, root),) = folders.items()
        files = [os.path.join(root, name) for name in names]
        problem = _missing_files(f"{path}:{root_key}", files, _Folders())
        if problem is not None:
            yield problem
        else:
            yield from _check_single_images(path, files, rule, extent)


def _check_single_images(path: str, files: list[str], rule: _SizeRule | None, extent: CheckScope) -> Iterator[str]:
    extent.facts.append(f"{path}: {len(files):,} images")
    if rule is not None and rule.metrics:
        yield from _check_measurable(path, ((file, _image_size(file)) for file in extent.chosen(files)), rule)


def _check_measurable(path: str, sizes: Iterable[tuple[str, Size | None]], rule: _SizeRule) -> Iterator[str]:
    yield from _summary(path, [(name, rule.unmeasurable(size)) for name, size in sizes if size])


def _check_pairs(
    path: str, dataset: Options, gt_names: list[str], rule: _SizeRule | None, extent: CheckScope
) -> Iterator[str]:
    """Whether each of `gt_names`, and the LQ image that belongs to it, is a file, and the sizes of some or all."""
    template = dataset.get("filename_tmpl", "{}")
    try:
        pairs = [_pair(dataset, name, template) for name in gt_names]
    except _TEMPLATE_ERRORS:
        yield f"{path}:filename_tmpl: {template!r} given; must be text with {{}} for the GT's name, such as '{{}}x4'"
        return
    folders = _Folders()
    for index, key in enumerate(("dataroot_lq", "dataroot_gt")):
        problem = _missing_files(f"{path}:{key}", [pair[index] for pair in pairs], folders)
        if problem is not None:
            yield problem + (f" (filename_tmpl is {template!r})" if key == "dataroot_lq" else "")
            rule = None
    if rule is not None:
        chosen = extent.chosen(pairs)
        extent.facts.append(f"{path}: {len(pairs):,} pairs, {_compared(len(chosen), len(pairs))} with {rule}")
        yield from _check_headers(path, chosen, rule)


def _compared(count: int, total: int) -> str:
    return "the sizes of all compared" if count == total else f"the sizes of {count:,} of them compared"


def _pair(dataset: Options, gt_name: str, template: str) -> tuple[str, str]:
    """The LQ and the GT file, as BasicSR names them."""
    stem, extension = os.path.splitext(os.path.basename(gt_name))
    lq = os.path.join(dataset["dataroot_lq"], template.format(stem) + extension)
    return lq, os.path.join(dataset["dataroot_gt"], gt_name)


class _Folders:
    """Tells which files exist by listing each folder once, far quicker than asking for every file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, file: str) -> bool:
        folder, name = os.path.split(file)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self._names[folder]


def _missing_files(path: str, files: list[str], folders: _Folders) -> str | None:
    missing = [file for file in files if file not in folders]
    if not missing:
        return None
    return f"{path}: {len(missing)} of {len(files)} images are missing, the first is {shown(missing[0])}"


def _check_headers(path: str, pairs: list[tuple[str, str]], rule: _SizeRule) -> Iterator[str]:
    problems = []
    for lq, gt in pairs:
        lq_size, gt_size = _image_size(lq), _image_size(gt)
        for file, size in ((lq, lq_size), (gt, gt_size)):
            if size is None:
                yield f"{path}: {file} cannot be read as an image; replace or remove it"
        if lq_size and gt_size:
            problems.append((gt, rule.problem(lq_size, gt_size)))
    yield from _summary(path, problems)


def _image_size(file: str) -> Size | None:
    """Height and width as OpenCV reads them; None when it cannot."""
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # of images that Pillow finds suspiciously large
            width, height = image.size
            # OpenCV turns photographs upright. Only for JPEG is the orientation known without decoding.
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if image.format == "JPEG" else 1
            return (width, height) if orientation >= _FIRST_TRANSPOSED_ORIENTATION else (height, width)
    except Exception:  # in all ways, of damaged headers; OpenCV, which will read it, may know better
        decoded = _decode(file)
        return None if decoded is None else decoded.shape[:2]


def _decode(file: str) -> Any:
    try:
        content = np.fromfile(file, np.uint8)
    except OSError:
        return None
    if not content.size or reason_against(content.tobytes()) is not None:
        return None
    try:
        return cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error:
        return None


def _check_lmdbs(path: str, folders: dict[str, str], rule: _SizeRule | None, extent: CheckScope) -> Iterator[str]:
    problems = [problem for key, folder in folders.items() for problem in _check_lmdb(f"{path}:{key}", folder)]
    yield from problems
    if problems:
        return
    if extent.thorough:
        for key, folder in folders.items():
            yield from check_content(f"{path}:{key}", folder, listed_sizes(folder))
    if len(folders) < 2:
        sizes = listed_sizes(next(iter(folders.values())))
        extent.facts.append(f"{path}: {len(sizes):,} images")
        if rule is not None:
            yield from _check_measurable(path, sizes.items(), rule)
        return
    lq, gt = (listed_sizes(folders[key]) for key in ("dataroot_lq", "dataroot_gt"))
    odd = sorted(lq.keys() ^ gt.keys())
    if odd:
        where = folders["dataroot_gt" if odd[0] in lq else "dataroot_lq"]
        yield (
            f"{path}: {len(lq)} images in {folders['dataroot_lq']!r} and {len(gt)} in {folders['dataroot_gt']!r}, "
            f"{len(odd)} of them in one only; {odd[0]!r} is missing in {where!r}"
        )
    elif rule is not None:
        extent.facts.append(f"{path}: {len(gt):,} pairs, {_compared(len(gt), len(gt))} with {rule}")
        pairs = ((key, lq[key], gt[key]) for key in gt)
        yield from _summary(path, [(key, rule.problem(a, b)) for key, a, b in pairs if a and b])


def _check_lmdb(path: str, folder: str) -> Iterator[str]:
    if not folder.endswith(".lmdb"):
        yield f"{path}: {folder!r} given; with io_backend type lmdb its name must end with .lmdb"
        return
    missing = [name for name in ("data.mdb", "meta_info.txt") if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        yield f"{path}: {folder!r} is not a whole LMDB: it has no {' and no '.join(missing)}. Create it again"
    elif not listed_sizes(folder):
        yield f"{path}: {folder!r} has no images: its meta_info.txt is empty. Create it again"


def _summary(path: str, problems: Iterable[tuple[str, str | None]]) -> Iterator[str]:
    """One line for all images with a problem: a wrong scale makes every image one."""
    checked = list(problems)
    found = [(name, problem) for name, problem in checked if problem]
    if found:
        name, problem = found[0]
        yield f"{path}: {len(found)} of {len(checked)} images checked have a wrong size, the first is {name}: {problem}"


def _backend(dataset: Options) -> Any:
    backend = dataset.get("io_backend")
    return backend.get("type") if isinstance(backend, dict) else "disk"


def _texts(value: Any) -> list[str]:
    """The paths in a value that may be one, a list of them or none."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shape(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
