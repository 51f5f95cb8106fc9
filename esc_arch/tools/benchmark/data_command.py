"""`basicsr benchmark data`: whether benchmark data are those that published figures were measured on."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from esc_arch.data.image_files import IMAGE_SUFFIXES
from esc_arch.errors import UserError
from esc_arch.options import load_options
from esc_arch.project import add_import_argument
from esc_arch.suggestions import did_you_mean

from .data_check import KNOWN_SETS, Folders, Report, check_folders, check_lmdbs
from .tables import FORMATS, Column, Table, check_report, deliver

__all__ = ["HELP", "add_arguments", "data_table", "run"]

HELP = "Check benchmark data: images, names, sizes, and what LR images were made with."

BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
DIV2K = ("DIV2K_train", "DIV2K_valid")
#: LR images of DIV2K that are compared: they are large, and were made by one program.
_MOST_OF_DIV2K = 20
#: Where archives keep HR images, under the folder of their set.
_PLACES = (".", "HR", "original", "GTmod12", "GTmod4", "GTmod2", "image_SRF_2", "image_SRF_4")
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
    names = ", ".join((*BENCHMARKS, *DIV2K))
    parser.add_argument("--sets", nargs="+", metavar="NAME", help=f"of {names} (all, but DIV2K only if it is there)")
    parser.add_argument("--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="(2 3 4)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="(%(default)s)")
    parser.add_argument("-o", "--report", type=Path, metavar="FILE", help="write it here instead of printing it")


def run(args: argparse.Namespace) -> int:
    """Print or write what was found; returns 1 when published figures cannot be reproduced with some of the data.

    Raises:
        UserError: an option file, a set or a scale cannot be used, or an image cannot be read.
    """
    check_report(args.report)
    reports = list(_of_option_files(args.opt) if args.opt else _of_root(args))
    deliver(_render(reports, args), args.report)
    return 1 if any(report.problems for report in reports) else 0


def _of_root(args: argparse.Namespace) -> Iterator[Report]:
    if any(scale < 2 for scale in args.scales):
        raise UserError(f"--scales {min(args.scales)}: benchmark data have scales from 2 on.")
    names = args.sets if args.sets is not None else [*BENCHMARKS, *(DIV2K if args.div2k.is_dir() else ())]
    for name in names:
        if name not in KNOWN_SETS:
            raise UserError(f"--sets {name} is not known. {did_you_mean(name, KNOWN_SETS)}.")
    for name in names:
        for scale in args.scales:
            yield _of_div2k(args.div2k, name, scale) if name in DIV2K else _of_set(args.root / name, name, scale)


def _of_set(folder: Path, name: str, scale: int) -> Report:
    place = Folders(name, scale, folder / "HR", folder / "LR_bicubic" / f"X{scale}", f"{{}}x{scale}")
    return check_folders(place, watch=_watched)


def _of_div2k(folder: Path, name: str, scale: int) -> Report:
    """The images as they are published, or without them the LMDBs that are made of them."""
    hr, lr = folder / f"{name}_HR", folder / f"{name}_LR_bicubic" / f"X{scale}"
    lmdbs = folder / f"{name}_HR_sub.lmdb", folder / f"{name}_LR_bicubic_X{scale}_sub.lmdb"
    if not hr.is_dir() and lmdbs[0].is_dir():
        return check_lmdbs(name, *lmdbs, scale)
    return check_folders(Folders(name, scale, hr, lr, f"{{}}x{scale}"), most=_MOST_OF_DIV2K, watch=_watched)


def _of_option_files(files: Sequence[Path]) -> Iterator[Report]:
    seen = set()
    for file in files:
        for folders in _paired_folders(file):
            if folders not in seen:
                seen.add(folders)
                yield check_folders(folders, watch=_watched)
    if not seen:
        raise UserError(
            f"{', '.join(map(str, files))}: no data set of type PairedImageDataset in folders; only these are checked."
        )


def _paired_folders(file: Path) -> Iterator[Folders]:
    opt = load_options(file)
    sections = opt.get("datasets")
    for phase, section in (sections if isinstance(sections, dict) else {}).items():
        if not isinstance(section, dict):
            continue
        section = {"name": phase, "scale": opt.get("scale")} | section
        try:
            folders = Folders.of(section)
        except (TypeError, ValueError):
            raise UserError(f"{file}: datasets:{phase} needs dataroot_gt, dataroot_lq and a whole scale.") from None
        if folders is not None:
            yield folders


def _watched(files: Sequence[Path]) -> Iterable[Path]:
    return tqdm(files, unit="image", leave=False, disable=None)  # None: on a terminal alone


# --- the report -----------------------------------------------------------------------------------------------------


def data_table(reports: Sequence[Report], notes: Sequence[str] = ()) -> Table:
    """What was found as a table, a row for each set and scale."""
    rows = [
        [
            report.name,
            report.scale,
            report.images,
            report.expected,
            report.resampling,
            "problem" if report.problems else "ok",
            " ".join(report.problems),
            " ".join(report.notes),
        ]
        for report in reports
    ]
    return Table(_COLUMNS, rows, notes=notes)


def _render(reports: Sequence[Report], args: argparse.Namespace) -> str:
    table = data_table(reports)
    if args.format in ("csv", "json"):
        return table.render(args.format)
    short = Table(_COLUMNS[:-2], [row[:-2] for row in table.rows], notes=[*_remarks(reports), *_mends(reports, args)])
    text = short.render(args.format)
    return text if args.format == "markdown" else _wrapped(text)


def _remarks(reports: Sequence[Report]) -> Iterator[str]:
    """Problems and notes, those of several scales once."""
    said: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        for remark in (*report.problems, *report.notes):
            said.setdefault((report.name, remark), []).append(report.scale)
    for (name, remark), scales in said.items():
        yield f"{name} {', '.join(f'x{scale}' for scale in scales)}: {remark}"


def _mends(reports: Sequence[Report], args: argparse.Namespace) -> Iterator[str]:
    """The commands that create what is wrong again."""
    if args.opt:
        if any(report.problems and report.hr_images for report in reports):
            yield (
                "To fix: basicsr prepare benchmark -i HR_FOLDER -o NEW_FOLDER, and NEW_FOLDER/HR and "
                "NEW_FOLDER/LR_bicubic/X... in the option file."
            )
        return
    names = dict.fromkeys(report.name for report in reports if report.problems and report.name in BENCHMARKS)
    for name in names:
        incomplete = any(report.name == name and report.expected != report.hr_images for report in reports)
        yield _mend(args.root / name, name, incomplete=incomplete)
    if any(report.problems and report.hr_images for report in reports if report.name == DIV2K[0]):
        source, target = (shlex.quote(str(folder)) for folder in (args.div2k / f"{DIV2K[0]}_HR", args.div2k))
        yield f"To fix {DIV2K[0]}: basicsr prepare train -i {source} -o {target}, which makes LR images of its own."


def _mend(folder: Path, name: str, *, incomplete: bool) -> str:
    """The command for a set; one that is there already is kept under another name."""
    source, in_use = _hr_source(folder), any((folder / place).is_dir() for place in ("HR", "LR_bicubic"))
    old, target = folder.with_name(f"{name}_old"), shlex.quote(str(folder))
    move = f"mv {target} {shlex.quote(str(old))} && " if in_use else ""
    if source is None or (in_use and incomplete):
        return (
            f"To fix {name}: put all of its HR images in FOLDER, and "
            f"{move}basicsr prepare benchmark -i FOLDER -o {target}"
        )
    images = shlex.quote(str((old if in_use else folder) / source))
    return f"To fix {name}: {move}basicsr prepare benchmark -i {images} -o {target}"


def _hr_source(folder: Path) -> str | None:
    """Where under the folder of a set HR images are."""
    for place in _PLACES:
        if (folder / place).is_dir() and any(
            path.suffix.lower() in IMAGE_SUFFIXES for path in (folder / place).iterdir() if path.is_file()
        ):
            return place
    return None


def _wrapped(text: str) -> str:
    """Remarks as wide as a page; commands stay in one line."""
    head, blank, remarks = text.partition("\n\n")
    lines = [
        line if line.startswith("To fix") else textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)
        for line in remarks.splitlines()
    ]
    return head + blank + "\n".join(lines) + ("\n" if lines else "")
