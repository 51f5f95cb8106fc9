"""`basicsr benchmark quality`: PSNR and SSIM of networks, compared with the paper and with a baseline."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.project import add_import_argument
from esc_arch.training.distributed import print_note
from esc_arch.training.run_locks import run_locks

from .data import KNOWN_SETS, check_folders, paired_folders
from .paper import PAPER_ROWS
from .plots import plot_gains, plot_quality, require_matplotlib, write_crops
from .quality import NO_PAPER, Evaluation, plan_evaluation, run_all
from .quality_tables import compute_gains, gain_table, per_image_table, quality_table
from .tables import TABLE_FORMATS

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Test networks with BasicSR's pipeline, and compare PSNR and SSIM with the paper."

BICUBIC = "bicubic"
#: LR images of a set that are compared with HR before a test; `basicsr benchmark data` compares all.
_IMAGES_CHECKED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is tested, how, and what it is compared with."""
    parser.add_argument("-opt", nargs="+", type=Path, required=True, metavar="FILE", help="option files of tests")
    add_import_argument(parser)
    parser.add_argument(
        "-m", "--weights", nargs="+", metavar="FILE", help="one for each option file, over its pretrain_network_g"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="published: the image padded by reflection to whole windows; srmodel: as it is; ensemble: published, mean "
        "over eight orientations (default: that of the option file, or published)",
    )
    parser.add_argument(
        "--paper",
        metavar="NAME",
        help=f"the paper's scores to compare with: {', '.join(PAPER_ROWS)} or {NO_PAPER} (recognised by the network)",
    )
    parser.add_argument("--baseline", metavar="FILE", help=f"an option file to compare images with, or {BICUBIC}")
    parser.add_argument(
        "--cost", type=Path, metavar="FILE", help="from basicsr benchmark cost --format json, for PSNR against latency"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(that of the file)")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="as in basicsr test")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="as in basicsr test")
    parser.add_argument("--format", choices=TABLE_FORMATS, default="text", help="of what is printed (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="a new folder for tables in all formats, plots and crops"
    )
    parser.add_argument("--no-figures", action="store_true", help="only tables in FOLDER")


@run_locks()  # what the tests wrote is read to the end
def run(args: argparse.Namespace) -> int:
    """Test, print a table and write FOLDER. Everything that can be wrong is looked for before the first test.

    Raises:
        UserError: something in the options, the data or a checkpoint cannot be used, or FOLDER exists.
    """
    draws = args.output is not None and not args.no_figures
    if args.output is not None and args.output.exists():
        raise UserError(f"{args.output} exists, and nothing is overwritten. Choose another folder with -o.")
    if draws:
        require_matplotlib()
    costs = _read_costs(args.cost) if args.cost else []
    evaluations = _plan(args, save_images=draws and args.baseline is not None)
    baseline = evaluations.pop() if args.baseline not in (None, BICUBIC) else None
    compared = [each for each in evaluations if each.paper]
    folders = dict.fromkeys(folders for each in compared for folders in paired_folders(each.opt, each.file))
    reports = [check_folders(each, _IMAGES_CHECKED) for each in folders if each.name in KNOWN_SETS]
    problems = [f"{report.dataset} x{report.scale}: {problem}" for report in reports for problem in report.problems]
    for problem in problems:
        print_note(f"{problem} basicsr benchmark data says more.")
    results = run_all([*evaluations, *([baseline] if baseline else [])])
    if os.environ.get("RANK", "0") != "0":
        return 0
    below = [each for each in results if each.evaluation is baseline] if baseline else None
    results = [each for each in results if each.evaluation is not baseline]
    gains = compute_gains(results, below) if args.baseline else []
    tables = {"quality": quality_table(results, problems)}
    if args.baseline:
        tables["gains"] = gain_table(gains, Path(args.baseline).stem)
    shown = [*tables.values()] if args.format in ("text", "markdown") else [tables["quality"]]
    print("\n".join(table.render(args.format) for table in shown), end="")
    if args.output is not None:
        args.output.mkdir(parents=True)
        for name, table in {**tables, "per_image": per_image_table(results)}.items():
            for form, ending in zip(TABLE_FORMATS, ("txt", "md", "csv", "json"), strict=True):
                write_atomically(args.output / f"{name}.{ending}", table.render(form).encode())
    if draws:
        plot_quality(args.output, results, costs)
        plot_gains(args.output, gains, baseline.name if baseline else BICUBIC)
        for each in gains:
            write_crops(args.output / "crops" / each.scores.evaluation.name / each.scores.dataset, each, baseline)
    return 0


def _plan(args: argparse.Namespace, *, save_images: bool) -> list[Evaluation]:
    """The evaluations of the option files, and last that of the baseline, if it is a network."""
    if args.weights is not None and len(args.weights) != len(args.opt):
        raise UserError(
            f"-m has {len(args.weights)} file(s) and -opt {len(args.opt)}: give one for each option file, in order."
        )
    forced = [*args.force_yml, *(["val:save_img=true"] if save_images else [])]
    if args.device != "auto":
        forced.append(f"num_gpu={int(args.device == 'cuda')}")
    files = [(file, args.paper) for file in args.opt]
    if args.baseline not in (None, BICUBIC):
        files.append((Path(args.baseline), NO_PAPER))
    planned: dict[str, Evaluation] = {}
    for (file, paper), weights in zip_longest(files, args.weights or ()):
        entries = forced if weights is None else [*forced, f"path:pretrain_network_g={json.dumps(weights)}"]
        new = plan_evaluation(file, entries, protocol=args.protocol, paper=paper, launcher=args.launcher)
        if new.name in planned:
            raise UserError(
                f"{planned[new.name].file} and {file} both have the name {new.name}, and would share "
                f"results/{new.name}. Give one of them another name."
            )
        planned[new.name] = new
    return list(planned.values())


def _read_costs(file: Path) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        if not all({"network", "scale", "output", "latency_ms"} <= record.keys() for record in records):
            raise ValueError("a record has no latency")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--cost {file} cannot be used: {error}. Make it with: basicsr benchmark cost --format json -o {file}"
        ) from None
    return list(records)
