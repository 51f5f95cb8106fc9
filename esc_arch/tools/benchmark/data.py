"""`basicsr benchmark data`: are these the data that published scores were measured on?"""

from __future__ import annotations

import argparse
import operator
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from esc_arch.atomic_io import check_output
from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.errors import UserError
from esc_arch.options import load_options

from .resampling import MATLAB, recognise_resampling
from .tables import Column, Table, write_report

__all__ = ["KNOWN_SETS", "check_folders", "paired_folders", "run"]


class KnownSet(NamedTuple):
    """A data set that papers use: how many images, what they are called, and who made it, by which to find it.

    `pattern` is a regular expression for the names without suffix; by default those listed in `files`.
    """

    images: int
    files: str
    source: str
    pattern: str = ""


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
}
#: What files of published archives have after their names.
_NAME_ENDINGS = r"(_HR|_GT|_SRF_[234]_HR)?"
#: What `prepare benchmark --crop common` and BasicSR's data sets named GTmod12 crop to multiples of.
_COMMON_MULTIPLE = 12


class PairedFolders(NamedTuple):
    """HR images and their LR images of one scale; `template` makes LR names of HR names, as `filename_tmpl`."""

    name: str
    scale: int
    hr: Path
    lr: Path
    template: str


def paired_folders(opt: Mapping[str, Any], file: Path) -> Iterator[PairedFolders]:
    """Those that an option file names; raises UserError if one has no folders, or a scale that is not an integer."""
    sections = opt.get("datasets")
    for phase, section in (sections if isinstance(sections, dict) else {}).items():
        if not isinstance(section, dict) or section.get("type") != "PairedImageDataset":
            continue
        if (section.get("io_backend") or {}).get("type", "disk") != "disk":
            continue
        section = {"name": phase, "scale": opt.get("scale"), "filename_tmpl": "{}"} | section
        try:
            hr, lr = (Path(os.path.expanduser(section[f"dataroot_{kind}"])) for kind in ("gt", "lq"))
            name, template = str(section["name"]), str(section["filename_tmpl"])
            yield PairedFolders(name, operator.index(section["scale"]), hr, lr, template)
        except (KeyError, TypeError):
            raise UserError(f"{file}: datasets:{phase} needs dataroot_gt, dataroot_lq and an integer scale.") from None


@dataclass
class DataReport:
    """What was found in a data set at a scale; None and 0 for what was not."""

    dataset: str
    scale: int
    #: Number of images of the published set.
    expected: int | None
    #: The command that makes the set again, once the HR images are there.
    fix: str
    #: Number of HR images that have LR images.
    images: int = 0
    #: How the LR images were made.
    resampling: str | None = None
    #: Why published scores cannot be reproduced with it, a sentence each.
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folders(folders: PairedFolders, most: int | None = None) -> DataReport:
    """Check the images of a set at a scale, their names and sizes, and how the LR images were made.

    At `most` so many LR images are compared with HR, evenly chosen (default: all). UserError if one cannot be read.
    """
    known = KNOWN_SETS.get(folders.name)
    source = f" It is the set of {known.source}; its files: {known.files}." if known else ""
    hr_files, lr_files = images_in(folders.hr), set(images_in(folders.lr))
    report = DataReport(folders.name, folders.scale, known and known.images, _fix(folders, len(hr_files), known))
    if not hr_files:
        report.problems.append(f"There are no HR images in {folders.hr}.{source}")
        return report
    if known:
        if len(hr_files) != known.images:
            report.problems.append(f"It has {len(hr_files)} HR images instead of {known.images}.{source}")
        pattern = re.compile(f"({known.pattern or known.files.replace(', ', '|')}){_NAME_ENDINGS}", re.IGNORECASE)
        if unknown := [file for file in hr_files if not pattern.fullmatch(file.stem)]:
            report.notes.append(f"{_some(unknown)}: not a name of the set, whose files are {known.files}.")
    if not lr_files:
        report.problems.append(f"There are no LR images in {folders.lr}.")
        return report
    partners = {hr: folders.lr / (folders.template.format(hr.stem) + hr.suffix) for hr in hr_files}
    if missing := set(partners.values()) - lr_files:
        report.problems.append(f"LR images are missing: {_some(missing)}.")
    if unpaired := lr_files.difference(partners.values()):
        report.problems.append(f"LR images belong to no HR image: {_some(unpaired)}.")
    pairs = [pair for pair in partners.items() if pair[1] in lr_files]
    report.images = len(pairs)
    step = -(-len(pairs) // most) if most and pairs else 1
    if step > 1:
        report.notes.append(f"One in {step} of its LR images was compared with HR.")
    _compare(report, pairs[::step])
    return report


def _compare(report: DataReport, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Compare LR images with HR: LR is made from as much of HR as the scale, or 12, divides."""
    made_by: dict[str, list[Path]] = {}
    wrong, is_cropped = [], len(pairs) > 2 and report.dataset in KNOWN_SETS
    for hr, lr in tqdm(pairs, unit="image", leave=False, disable=None):  # None: shown on a terminal only
        image, small = read_image(hr), read_image(lr)
        height, width = image.shape[:2]
        is_cropped &= height % _COMMON_MULTIPLE == width % _COMMON_MULTIPLE == 0
        expected, other = (
            (height // multiple * multiple // report.scale, width // multiple * multiple // report.scale)
            for multiple in (report.scale, _COMMON_MULTIPLE)
        )
        if small.shape[:2] in (expected, other):
            made_by.setdefault(recognise_resampling(image, small, report.scale), []).append(lr)
        else:
            wrong.append(
                f"{lr.name} is {small.shape[1]} x {small.shape[0]}, but {hr.name} is {width} x {height}, which makes "
                f"{expected[1]} x {expected[0]} at x{report.scale}."
            )
    if wrong:
        report.problems.append(f"{len(wrong)} of {len(pairs)} LR images have the wrong size: {wrong[0]}")
    others = sorted(made_by.keys() - {MATLAB}, key=lambda way: -len(made_by[way]))
    report.resampling = next(iter([*others, *made_by]), None)
    for way in others[:3]:
        report.problems.append(
            f"{len(made_by[way])} of {len(pairs) - len(wrong)} LR images compared were not made by {MATLAB}, but by "
            f"{way}: {_some(made_by[way])}."
        )
    if is_cropped:
        report.notes.append(
            f"All HR images are cropped to multiples of {_COMMON_MULTIPLE}; published scores are of images cropped for "
            "each scale separately, so means differ slightly. Create it again from whole HR images."
        )


def _fix(folders: PairedFolders, hr_images: int, known: KnownSet | None) -> str:
    """The command that makes the set again, beside what is there."""
    folder = folders.hr.parent
    is_complete = hr_images == known.images if known else hr_images > 0
    source = folders.hr if is_complete else folder if images_in(folder) else "FOLDER_OF_ALL_HR_IMAGES"
    prepare = f"basicsr prepare benchmark -i {shlex.quote(str(source))} -o"
    if not (folders.hr.exists() or folders.lr.parent.exists()):
        return f"{prepare} {shlex.quote(str(folder))}"
    new = shlex.quote(f"{folder}_new")
    return f"{prepare} {new}, then use its folders in place of {folders.hr} and {folders.lr.parent}."


def images_in(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name; none if it does not exist."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def _some(files: Iterable[Path]) -> str:
    names = sorted(file.name for file in files)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- the command ----------------------------------------------------------------------------------------------------

_COLUMNS = (
    Column("dataset", "data set"),
    Column("scale", style="d"),
    Column("images", style="d"),
    Column("expected", style="d"),
    Column("resampling", "LR made by"),
    Column("state"),
    Column("problems"),
    Column("notes"),
)


def run(args: argparse.Namespace) -> int:
    """Print or write what was found; returns 1 if published scores cannot be reproduced with some of the data."""
    if args.report is not None:
        check_output(args.report, overwrite=True)
    if args.opt:
        folders = dict.fromkeys(each for file in args.opt for each in paired_folders(load_options(file), file))
        if not folders:
            files = ", ".join(map(str, args.opt))
            raise UserError(f"{files}: no data set of type PairedImageDataset in folders; only these are checked.")
    else:
        if min(args.scales) < 2:
            raise UserError(f"--scales {min(args.scales)}: benchmark data have scales from 2 on.")
        roots = ((args.root / name, scale) for name, scale in product(args.sets, args.scales))
        folders = dict.fromkeys(
            PairedFolders(root.name, scale, root / "HR", root / f"LR_bicubic/X{scale}", f"{{}}x{scale}")
            for root, scale in roots
        )
    reports = [check_folders(each) for each in folders]
    remarks: dict[tuple[str, str], list[str]] = {}  # the scales of each
    records = []
    for report in reports:
        texts = {"problems": " ".join(report.problems), "notes": " ".join(report.notes)}
        records.append(vars(report) | texts | {"state": "problem" if report.problems else "ok"})
        for remark in (*report.problems, *report.notes):
            remarks.setdefault((report.dataset, remark), []).append(f"x{report.scale}")
    table = Table(_COLUMNS, records)
    if args.format in ("text", "markdown"):
        lines = [f"{name} {', '.join(scales)}: {remark}" for (name, remark), scales in remarks.items()]
        fixes = {report.dataset: f"To fix {report.dataset}: {report.fix}" for report in reports if report.problems}
        table = Table(_COLUMNS[:-2], records, [*lines, *fixes.values()])
    write_report(table.render(args.format), args.report)
    return 1 if any(report.problems for report in reports) else 0
