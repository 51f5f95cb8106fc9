"""`basicsr benchmark data`: are these the data that published scores were measured on?"""

from __future__ import annotations

import argparse
import operator
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.errors import UserError
from esc_arch.names import did_you_mean
from esc_arch.options import load_options
from esc_arch.options.image_checks import image_size
from esc_arch.project import add_import_argument

from .resampling import MATLAB, recognise_resampling
from .tables import Column, Table, add_report_arguments, check_report, write_report

__all__ = ["HELP", "KNOWN_SETS", "add_arguments", "check_folders", "paired_folders", "run"]

HELP = "Check benchmark data: images, names, sizes, and how LR images were made."


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
            hr, lr = (Path(section[f"dataroot_{kind}"]).expanduser() for kind in ("gt", "lq"))
            name, template = str(section["name"]), str(section["filename_tmpl"])
            yield PairedFolders(name, operator.index(section["scale"]), hr, lr, template)
        except (KeyError, TypeError):
            raise UserError(f"{file}: datasets:{phase} needs dataroot_gt, dataroot_lq and an integer scale.") from None


@dataclass
class DataReport:
    """What was found in a data set at a scale.

    Attributes:
        expected: number of images of the published set; None for unknown sets.
        images: number of HR images that have LR images.
        resampling: how the LR images were made; None if none was compared.
        problems: why published scores cannot be reproduced with it, a sentence each.
        notes: what else is good to know.
        fix: the command that makes the set again, once the HR images are there.
    """

    dataset: str
    scale: int
    expected: int | None = None
    images: int = 0
    resampling: str | None = None
    fix: str = ""
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
    source = f" It is the set of {known.source}; its files: {known.files}." if known else ""
    hr_files, lr_files = images_in(folders.hr), set(images_in(folders.lr))
    report = DataReport(folders.name, folders.scale, known and known.images, fix=_fix(folders, len(hr_files), known))
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
    pairs = {hr: lr for hr, lr in partners.items() if lr in lr_files}
    report.images = len(pairs)
    fitting = _check_sizes(report, pairs)
    step = 1 if most is None else -(-len(fitting) // most) or 1
    if step > 1:
        report.notes.append(f"One in {step} of its LR images was compared with HR.")
    found: dict[str, list[Path]] = {}
    for hr in tqdm(fitting[::step], unit="image", leave=False, disable=None):  # None: shown on a terminal only
        way = recognise_resampling(read_image(hr), read_image(pairs[hr]), report.scale)
        found.setdefault(way, []).append(pairs[hr])
    others = sorted(found.keys() - {MATLAB}, key=lambda way: -len(found[way]))
    report.resampling = next(iter([*others, *found]), None)
    for way in others[:3]:
        report.problems.append(
            f"{len(found[way])} of {len(fitting[::step])} LR images compared were not made by {MATLAB}, but by {way}: "
            f"{_some(found[way])}."
        )
    return report


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


def _check_sizes(report: DataReport, pairs: Mapping[Path, Path]) -> list[Path]:
    """The HR images whose LR fits: made from as much of HR as the scale, or 12, divides."""
    fitting, wrong, is_cropped = [], "", len(pairs) > 2 and report.dataset in KNOWN_SETS
    for hr, lr in pairs.items():
        size, small = image_size(str(hr)), image_size(str(lr))
        if size is None or small is None:
            raise UserError(f"{lr if size else hr} cannot be read as an image. Replace or remove it.")
        height, width = size
        is_cropped &= height % _COMMON_MULTIPLE == width % _COMMON_MULTIPLE == 0
        expected, other = (
            (height // multiple * multiple // report.scale, width // multiple * multiple // report.scale)
            for multiple in (report.scale, _COMMON_MULTIPLE)
        )
        if small in (expected, other):
            fitting.append(hr)
        elif not wrong:
            wrong = (
                f"{lr.name} is {small[1]} x {small[0]}, but {hr.name} is {width} x {height}, which makes {expected[1]} "
                f"x {expected[0]} at x{report.scale}."
            )
    if wrong:
        bad = len(pairs) - len(fitting)
        report.problems.append(f"{bad} of {len(pairs)} LR images have the wrong size: {wrong}")
    if is_cropped:
        report.notes.append(
            f"All HR images are cropped to multiples of {_COMMON_MULTIPLE}; published scores are of images cropped for "
            "each scale separately, so means differ slightly. Create it again from whole HR images."
        )
    return fitting


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is checked."""
    parser.add_argument("-opt", nargs="+", type=Path, default=[], metavar="FILE", help="the data that these files name")
    add_import_argument(parser)
    parser.add_argument(
        "--root", type=Path, default=Path("datasets/benchmark"), metavar="FOLDER", help="of the five sets (%(default)s)"
    )
    parser.add_argument(
        "--sets", nargs="+", default=[*KNOWN_SETS], metavar="NAME", help=f"of {', '.join(KNOWN_SETS)} (all)"
    )
    parser.add_argument("--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="(2 3 4)")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print or write what was found; returns 1 if published scores cannot be reproduced with some of the data.

    Raises:
        UserError: an option file, a set or a scale cannot be used, or an image cannot be read.
    """
    check_report(args.report)
    if args.opt:
        folders = dict.fromkeys(each for file in args.opt for each in paired_folders(load_options(file), file))
        if not folders:
            files = ", ".join(map(str, args.opt))
            raise UserError(f"{files}: no data set of type PairedImageDataset in folders; only these are checked.")
    else:
        folders = dict.fromkeys(_folders_of_sets(args))
    reports = [check_folders(each) for each in folders]
    scales: dict[tuple[str, str], list[str]] = {}
    records = []
    for report in reports:
        texts = {"problems": " ".join(report.problems), "notes": " ".join(report.notes)}
        records.append(vars(report) | texts | {"state": "problem" if report.problems else "ok"})
        for remark in (*report.problems, *report.notes):
            scales.setdefault((report.dataset, remark), []).append(f"x{report.scale}")
    if args.format in ("csv", "json"):
        table = Table(_COLUMNS, records)
    else:
        remarks = [f"{name} {', '.join(those)}: {remark}" for (name, remark), those in scales.items()]
        fixes = {report.dataset: f"To fix {report.dataset}: {report.fix}" for report in reports if report.problems}
        table = Table(_COLUMNS[:-2], records, [*remarks, *fixes.values()])
    write_report(table.render(args.format), args.report)
    return 1 if any(report.problems for report in reports) else 0


def _folders_of_sets(args: argparse.Namespace) -> Iterator[PairedFolders]:
    if min(args.scales) < 2:
        raise UserError(f"--scales {min(args.scales)}: benchmark data have scales from 2 on.")
    for name, scale in product(args.sets, args.scales):
        if name not in KNOWN_SETS:
            raise UserError(f"--sets {name} is not known. {did_you_mean(name, KNOWN_SETS)}.")
        folder = args.root / name
        yield PairedFolders(name, scale, folder / "HR", folder / f"LR_bicubic/X{scale}", f"{{}}x{scale}")
