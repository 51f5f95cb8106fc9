"""`basicsr benchmark data`: whether benchmark data are those that published scores were measured on."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from esc_arch.errors import UserError
from esc_arch.options import load_options
from esc_arch.project import add_import_argument
from esc_arch.suggestions import did_you_mean

from .data_check import (
    BENCHMARKS,
    KNOWN_SETS,
    DataReport,
    PairedFolders,
    check_folders,
    check_lmdbs,
    images_in,
    paired_folders,
)
from .tables import Column, Table, add_report_arguments, check_report, write_report

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Check benchmark data: images, names, sizes, and how LR images were made."

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
    reports = _check_option_files(args.opt) if args.opt else _check_known_sets(args)
    records = [
        vars(report)
        | {
            "state": "problem" if report.problems else "ok",
            "problems": " ".join(report.problems),
            "notes": " ".join(report.notes),
        }
        for report in reports
    ]
    if args.format in ("csv", "json"):
        table = Table(_COLUMNS, records)
    else:
        table = Table(_COLUMNS[:-2], records, [*_remarks(reports), *_fixes(reports, args)])
    write_report(table.render(args.format), args.report)
    return 1 if any(report.problems for report in reports) else 0


def _check_option_files(files: Sequence[Path]) -> list[DataReport]:
    folders = dict.fromkeys(each for file in files for each in paired_folders(load_options(file), file))
    if not folders:
        raise UserError(
            f"{', '.join(map(str, files))}: no data set of type PairedImageDataset in folders; only these are checked."
        )
    return [check_folders(each) for each in folders]


def _check_known_sets(args: argparse.Namespace) -> list[DataReport]:
    if min(args.scales) < 2:
        raise UserError(f"--scales {min(args.scales)}: benchmark data have scales from 2 on.")
    names = args.sets if args.sets is not None else KNOWN_SETS if args.div2k.is_dir() else BENCHMARKS
    for name in names:
        if name not in KNOWN_SETS:
            raise UserError(f"--sets {name} is not known. {did_you_mean(name, KNOWN_SETS)}.")
    return [
        _check_benchmark(args.root / name, name, scale) if name in BENCHMARKS else _check_div2k(args.div2k, name, scale)
        for name in names
        for scale in args.scales
    ]


def _check_benchmark(folder: Path, name: str, scale: int) -> DataReport:
    lr = folder / "LR_bicubic" / f"X{scale}"
    return check_folders(PairedFolders(name, scale, folder / "HR", lr, f"{{}}x{scale}"))


def _check_div2k(folder: Path, name: str, scale: int) -> DataReport:
    """The images as they are published, or without them the LMDBs made of them."""
    hr, lr = folder / f"{name}_HR", folder / f"{name}_LR_bicubic" / f"X{scale}"
    hr_lmdb, lr_lmdb = folder / f"{name}_HR_sub.lmdb", folder / f"{name}_LR_bicubic_X{scale}_sub.lmdb"
    if not hr.is_dir() and hr_lmdb.is_dir():
        return check_lmdbs(name, hr_lmdb, lr_lmdb, scale)
    return check_folders(PairedFolders(name, scale, hr, lr, f"{{}}x{scale}"), most=_MOST_OF_DIV2K)


def _remarks(reports: Sequence[DataReport]) -> Iterator[str]:
    """Problems and notes, each once for all the scales it applies to."""
    scales: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for remark in (*report.problems, *report.notes):
            scales.setdefault((report.dataset, remark), []).append(f"x{report.scale}")
    for (name, remark), those in scales.items():
        yield f"{name} {', '.join(those)}: {remark}"


def _fixes(reports: Sequence[DataReport], args: argparse.Namespace) -> Iterator[str]:
    """The commands that create faulty sets again."""
    faulty = {report.dataset: report for report in reports if report.problems}
    has_hr = any(report.hr_images for report in faulty.values())
    if args.opt:
        if has_hr:
            yield (
                "To fix: basicsr prepare benchmark -i HR_FOLDER -o NEW_FOLDER, and NEW_FOLDER/HR and "
                "NEW_FOLDER/LR_bicubic/X... in the option file."
            )
        return
    for name, report in faulty.items():
        if name in BENCHMARKS:
            yield f"To fix {name}: {_prepare_benchmark(args.root / name, report)}"
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
