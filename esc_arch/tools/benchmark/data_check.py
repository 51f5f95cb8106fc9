"""Checks whether benchmark data are those that published scores were measured on."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from tqdm import tqdm

from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.data.lmdb_writer import read_shapes
from esc_arch.errors import UserError

from .resampling import MATLAB, recognise_resampling

__all__ = ["BENCHMARKS", "KNOWN_SETS", "PairedFolders", "check_folders", "check_lmdbs", "images_in", "paired_folders"]

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class KnownSet:
    """A data set that papers use.

    Attributes:
        images: how many it has.
        files: how they are called, in words.
        source: who made it, by which to find it.
        pattern: the names without suffix, as a regular expression; default: those listed in `files`.
    """

    images: int
    files: str
    source: str
    pattern: str = ""

    def __str__(self) -> str:
        """A sentence on where to get it."""
        return f" It is the set of {self.source}; its files: {self.files}."


BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
_DIV2K_SOURCE = "Agustsson and Timofte, NTIRE 2017 at CVPR: the archives {0}_HR, {0}_LR_bicubic_X2, _X3, _X4"

KNOWN_SETS: Mapping[str, KnownSet] = {
    "Set5": KnownSet(
        5,
        "baby, bird, butterfly, head, woman",
        "Bevilacqua et al., BMVC 2012, nonnegative neighbor embedding",
    ),
    "Set14": KnownSet(
        14,
        "baboon, barbara, bridge, coastguard, comic, face, flowers, foreman, lenna, man, monarch, pepper, ppt3, zebra",
        "Zeyde, Elad and Protter, Curves and Surfaces 2010, sparse representations",
    ),
    "B100": KnownSet(
        100,
        "numbers such as 101085",
        "the 100 test images of the Berkeley Segmentation Dataset BSDS300, Martin et al., ICCV 2001",
        r"\d{4,6}",
    ),
    "Urban100": KnownSet(
        100,
        "img001 ... img100, also as img_001",
        "Huang, Singh and Ahuja, CVPR 2015, transformed self-exemplars (SelfExSR)",
        r"img_?\d{3}",
    ),
    "Manga109": KnownSet(
        109,
        "titles such as ARMS, YumeiroCooking",
        "Matsui et al., Multimedia Tools and Applications 2017, sketch-based manga retrieval, who give it on request",
        ".+",
    ),
    "DIV2K_train": KnownSet(800, "0001 ... 0800", _DIV2K_SOURCE.format("DIV2K_train"), r"0[0-7]\d\d|0800"),
    "DIV2K_valid": KnownSet(100, "0801 ... 0900", _DIV2K_SOURCE.format("DIV2K_valid"), r"08\d\d|0900"),
}
#: What files of published archives have after their names.
_NAME_ENDINGS = r"(_HR|_GT|_SRF_[234]_HR)?"
#: What `prepare benchmark --crop common` and BasicSR's data sets named GTmod12 crop to multiples of.
_COMMON_MULTIPLE = 12


@dataclass(frozen=True)
class PairedFolders:
    """HR images and their LR images of one scale.

    Attributes:
        template: name of an LR file, made from the name of the HR file, as `filename_tmpl` of option files.
    """

    name: str
    scale: int
    hr: Path
    lr: Path
    template: str


def paired_folders(opt: Mapping[str, Any], file: Path) -> Iterator[PairedFolders]:
    """Those of the data sets of an option file that are paired images in folders.

    Raises:
        UserError: one has no folders, or a scale that is not an integer.
    """
    for phase, section in (opt.get("datasets") or {}).items():
        section = {"name": phase, "scale": opt.get("scale"), "io_backend": {}, "filename_tmpl": "{}"} | section
        if section.get("type") != "PairedImageDataset" or section["io_backend"].get("type", "disk") != "disk":
            continue
        try:
            hr, lr = (Path(section[f"dataroot_{kind}"]).expanduser() for kind in ("gt", "lq"))
            yield PairedFolders(section["name"], operator.index(section["scale"]), hr, lr, section["filename_tmpl"])
        except (KeyError, TypeError):
            raise UserError(f"{file}: datasets:{phase} needs dataroot_gt, dataroot_lq and an integer scale.") from None


@dataclass
class DataReport:
    """What was found in a data set at a scale.

    Attributes:
        expected: number of images of the published set; None for unknown sets.
        hr_images: number of HR images.
        images: those of them that have LR images.
        resampling: how the LR images were made; None if none was compared.
        problems: why published scores cannot be reproduced with it, a sentence each.
        notes: what else is good to know.
    """

    dataset: str
    scale: int
    expected: int | None = None
    hr_images: int = 0
    images: int = 0
    resampling: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folders(folders: PairedFolders, most: int | None = None) -> DataReport:
    """Check the images of a set at a scale, their names and sizes, and how the LR images were made.

    Args:
        most: compare at most so many LR images with HR, evenly chosen; default: all.

    Raises:
        UserError: an image cannot be read.
    """
    known = KNOWN_SETS.get(folders.name)
    hr_files, lr_files = images_in(folders.hr), set(images_in(folders.lr))
    report = DataReport(folders.name, folders.scale, known.images if known else None, len(hr_files))
    if not hr_files:
        report.problems.append(f"There are no HR images in {folders.hr}.{known or ''}")
        return report
    if known:
        _check_names(report, known, hr_files)
    if not lr_files:
        report.problems.append(f"There are no LR images in {folders.lr}.")
        return report
    pairs = {hr: folders.lr / (folders.template.format(hr.stem) + hr.suffix) for hr in hr_files}
    if missing := [lr.name for lr in pairs.values() if lr not in lr_files]:
        report.problems.append(f"LR images are missing: {_some(missing)}.")
    if unpaired := sorted(lr.name for lr in lr_files.difference(pairs.values())):
        report.problems.append(f"LR images belong to no HR image: {_some(unpaired)}.")
    pairs = {hr: lr for hr, lr in pairs.items() if lr in lr_files}
    report.images = len(pairs)
    fitting = _check_sizes(report, pairs)
    step = 1 if most is None else -(-len(fitting) // most) or 1
    _check_resampling(report, fitting[::step])
    if step > 1:
        report.notes.append(f"One in {step} of its LR images was compared with HR.")
    return report


def images_in(folder: Path) -> list[Path]:
    """The images directly in a folder; none if it does not exist."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_names(report: DataReport, known: KnownSet, files: Sequence[Path]) -> None:
    if len(files) != known.images:
        report.problems.append(f"It has {len(files)} HR images instead of {known.images}.{known}")
    pattern = re.compile(f"({known.pattern or known.files.replace(', ', '|')}){_NAME_ENDINGS}", re.IGNORECASE)
    if unknown := [path.name for path in files if not pattern.fullmatch(path.stem)]:
        report.notes.append(f"{_some(unknown)}: not a name of the set, whose files are {known.files}.")


def _check_sizes(report: DataReport, pairs: Mapping[Path, Path]) -> list[tuple[Path, Path]]:
    """The pairs whose sizes fit the scale: of LR made of as much of HR as the scale divides, or 12."""
    scale, fitting, wrong = report.scale, [], []
    multiples = True
    for hr, lr in pairs.items():
        large, small = _size_of(hr), _size_of(lr)
        multiples &= large[0] % _COMMON_MULTIPLE == large[1] % _COMMON_MULTIPLE == 0
        reduced = _reduced(large, scale, scale)
        if small in (reduced, _reduced(large, _COMMON_MULTIPLE, scale)):
            fitting.append((hr, lr))
        else:
            wrong.append(
                f"{lr.name} is {_in_pixels(small)}, but {hr.name} is {_in_pixels(large)}, which makes "
                f"{_in_pixels(reduced)} at x{scale}"
            )
    if wrong:
        report.problems.append(f"{len(wrong)} of {len(pairs)} LR images have the wrong size: {wrong[0]}.")
    if multiples and len(pairs) > 2 and report.dataset in BENCHMARKS:
        report.notes.append(
            f"All HR images are cropped to multiples of {_COMMON_MULTIPLE}; published scores are of images cropped for "
            "each scale separately, so means differ slightly. Create it again from whole HR images."
        )
    return fitting


def _reduced(hr: Size, multiple: int, scale: int) -> Size:
    return hr[0] // multiple * multiple // scale, hr[1] // multiple * multiple // scale


def _size_of(path: Path) -> Size:
    try:
        with Pillow.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Replace or remove it.") from None


def _in_pixels(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


def _check_resampling(report: DataReport, pairs: Sequence[tuple[Path, Path]]) -> None:
    found: dict[str, list[str]] = {}
    for hr, lr in tqdm(pairs, unit="image", leave=False, disable=None):  # None: shown on a terminal only
        way = recognise_resampling(read_image(hr), read_image(lr), report.scale)
        found.setdefault(way, []).append(lr.name)
    others = sorted(found.keys() - {MATLAB}, key=lambda way: -len(found[way]))
    report.resampling = others[0] if others else MATLAB if found else None
    for way in others[:3]:
        report.problems.append(
            f"{len(found[way])} of {len(pairs)} LR images compared were not made by {MATLAB}, but by {way}: "
            f"{_some(found[way])}."
        )


def check_lmdbs(name: str, hr: Path, lr: Path, scale: int) -> DataReport:
    """Check the LMDBs of sub-images that `basicsr prepare train` makes: their images and sizes."""
    known = KNOWN_SETS[name]
    report = DataReport(name, scale, known.images)
    if missing := [str(path) for path in (hr, lr) if not (path / "meta_info.txt").is_file()]:
        report.problems.append(f"{' and '.join(missing)}: missing, or not made by basicsr prepare train.")
        return report
    large, small = read_shapes(hr), read_shapes(lr)
    report.images = len({key.rpartition("_s")[0] for key in large})
    if report.images != known.images:
        report.problems.append(f"{hr} is of {report.images} images instead of {known.images}.{known}")
    if large.keys() != small.keys():
        report.problems.append(f"{lr} has other sub-images than {hr}.")
    both = large.keys() & small.keys()
    if wrong := sorted(key for key in both if large[key][:2] != (small[key][0] * scale, small[key][1] * scale)):
        report.problems.append(f"{len(wrong)} sub-images of {lr} have the wrong size for x{scale}: {_some(wrong)}.")
    report.notes.append("Sub-images are not compared; basicsr prepare train makes LR by MATLAB's bicubic or uses --lr.")
    return report
