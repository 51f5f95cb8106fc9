"""`basicsr benchmark data`: are these the benchmark data that published scores were measured on?."""

from __future__ import annotations

import argparse
import operator
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as Pillow
from tqdm import tqdm

from esc_arch.data.image_files import IMAGE_SUFFIXES, read_image
from esc_arch.errors import UserError
from esc_arch.names import did_you_mean
from esc_arch.options import load_options
from esc_arch.project import add_import_argument

from .resampling import MATLAB, recognise_resampling
from .tables import Column, Table, add_report_arguments, check_report, write_report

__all__ = ["HELP", "KNOWN_SETS", "add_arguments", "check_folders", "paired_folders", "run"]

HELP = "Check benchmark data: images, names, sizes, and how LR images were made."

Pair = tuple[Path, Path]  # HR, LR


class KnownSet(NamedTuple):
    """A data set that papers use.

    Attributes:
        images: how many it has.
        files: what they are called, in words.
        source: who made it, by which to find it.
        pattern: the names without suffix, as a regular expression; default: those listed in `files`.
    """

    images: int
    files: str
    source: str
    pattern: str = ""


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


class PairedFolders(NamedTuple):
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
    source = f" It is the set of {known.source}; its files: {known.files}." if known else ""
    hr_files, lr_files = images_in(folders.hr), set(images_in(folders.lr))
    report = DataReport(folders.name, folders.scale, known.images if known else None, len(hr_files))
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
    fitting = _check_sizes(report, pairs)
    step = 1 if most is None else -(-len(fitting) // most) or 1
    _check_resampling(report, fitting[::step])
    if step > 1:
        report.notes.append(f"One in {step} of its LR images was compared with HR.")
    return report


def images_in(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name; none if it does not exist."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def _some(files: Iterable[Path]) -> str:
    names = sorted(file.name for file in files)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_sizes(report: DataReport, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose sizes fit: LR may be made from as much of HR as the scale, or 12, divides."""
    fitting, wrong, is_cropped = [], "", len(pairs) > 2 and report.dataset in BENCHMARKS
    for hr, lr in pairs:
        (height, width), small = _size_of(hr), _size_of(lr)
        is_cropped &= height % _COMMON_MULTIPLE == width % _COMMON_MULTIPLE == 0
        expected, other = (
            (height // multiple * multiple // report.scale, width // multiple * multiple // report.scale)
            for multiple in (report.scale, _COMMON_MULTIPLE)
        )
        if small in (expected, other):
            fitting.append((hr, lr))
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


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width."""
    try:
        with Pillow.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Replace or remove it.") from None


def _check_resampling(report: DataReport, pairs: Sequence[Pair]) -> None:
    found: dict[str, list[Path]] = {}
    for hr, lr in tqdm(pairs, unit="image", leave=False, disable=None):  # None: shown on a terminal only
        way = recognise_resampling(read_image(hr), read_image(lr), report.scale)
        found.setdefault(way, []).append(lr)
    others = sorted((way for way in found if way != MATLAB), key=lambda way: -len(found[way]))
    report.resampling = next(iter([*others, *found]), None)
    for way in others[:3]:
        report.problems.append(
            f"{len(found[way])} of {len(pairs)} LR images compared were not made by {MATLAB}, but by {way}: "
            f"{_some(found[way])}."
        )


# --- the command ----------------------------------------------------------------------------------------------------

#: LR images of DIV2K that are compared with HR: they are large, and were made by one program.
_MOST_OF_DIV2K = 20
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
        "--div2k", type=Path, default=Path("datasets/DIV2K"), metavar="FOLDER", help="of DIV2K (%(default)s)"
    )
    parser.add_argument(
        "--sets", nargs="+", metavar="NAME", help=f"of {', '.join(KNOWN_SETS)} (all, but DIV2K only if it is there)"
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
    reports = [check_folders(each, None if args.opt or each.name in BENCHMARKS else _MOST_OF_DIV2K) for each in folders]
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
        table = Table(_COLUMNS[:-2], records, [*remarks, *_fixes(reports, args)])
    write_report(table.render(args.format), args.report)
    return 1 if any(report.problems for report in reports) else 0


def _folders_of_sets(args: argparse.Namespace) -> Iterator[PairedFolders]:
    if min(args.scales) < 2:
        raise UserError(f"--scales {min(args.scales)}: benchmark data have scales from 2 on.")
    there = [name for name in KNOWN_SETS if name in BENCHMARKS or (args.div2k / f"{name}_HR").is_dir()]
    for name, scale in product(there if args.sets is None else args.sets, args.scales):
        if name not in KNOWN_SETS:
            raise UserError(f"--sets {name} is not known. {did_you_mean(name, KNOWN_SETS)}.")
        start = f"{args.root / name}/" if name in BENCHMARKS else f"{args.div2k / name}_"
        yield PairedFolders(name, scale, Path(f"{start}HR"), Path(f"{start}LR_bicubic/X{scale}"), f"{{}}x{scale}")


def _fixes(reports: Sequence[DataReport], args: argparse.Namespace) -> Iterator[str]:
    """The commands that create faulty sets again."""
    for name, report in {report.dataset: report for report in reports if report.problems}.items():
        if not args.opt and name in BENCHMARKS:
            yield f"To fix {name}: {_prepare_benchmark(args.root / name, report)}"
        elif args.opt and report.hr_images:
            prepare = "basicsr prepare benchmark -i HR_FOLDER -o NEW_FOLDER"
            yield f"To fix {name}: {prepare}, then NEW_FOLDER/HR and NEW_FOLDER/LR_bicubic/X... in the option file."
        elif name == "DIV2K_train" and report.hr_images:
            source, target = shlex.quote(f"{args.div2k}/{name}_HR"), shlex.quote(str(args.div2k))
            yield f"To fix {name}: basicsr prepare train -i {source} -o {target}, which makes its own LR images."


def _prepare_benchmark(folder: Path, report: DataReport) -> str:
    """The command that creates a set; an existing one is kept under another name."""
    target, old = shlex.quote(str(folder)), shlex.quote(f"{folder}_old")
    move, source = "", target if images_in(folder) else None
    if (folder / "HR").is_dir() or (folder / "LR_bicubic").is_dir():
        move, source = f"mv {target} {old} && ", f"{old}/HR" if report.hr_images == report.expected else None
    get = "" if source else "put all of its HR images in FOLDER, and "
    return f"{get}{move}basicsr prepare benchmark -i {source or 'FOLDER'} -o {target}"
