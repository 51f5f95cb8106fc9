"""`basicsr benchmark quality`: PSNR and SSIM of networks beside the paper's."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from esc_arch.atomic_io import write_atomically
from esc_arch.data.image_files import encode_png
from esc_arch.errors import UserError
from esc_arch.models.comparison import side_by_side
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.project import add_import_argument
from esc_arch.training.distributed import print_note

from .cost import cost_of, output_size
from .figures import Bubble, draw_bubbles, draw_gains, require_matplotlib
from .paper import paper_cost
from .quality import (
    BICUBIC,
    NO_PAPER,
    PAPER_NAMES,
    Gains,
    Outcome,
    Trial,
    bicubic_images,
    data_problems,
    gain_table,
    gains_over,
    paper_quality,
    plan,
    quality_table,
    run_trials,
)
from .tables import FORMATS, Column, Table

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Test networks with BasicSR's pipeline, and show PSNR and SSIM beside the paper's."

#: The size of enlarged images that the paper's costs are for.
_OUTPUT = "HD"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is outcome, how, and what it is compared with."""
    parser.add_argument("-opt", nargs="+", type=Path, required=True, metavar="FILE", help="option files of tests")
    add_import_argument(parser)
    parser.add_argument(
        "-m", "--weights", nargs="+", metavar="FILE", help="one for each option file, over its pretrain_network_g"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="published: the image padded by reflection to whole windows; srmodel: as it is; ensemble: published, mean "
        "over eight orientations (that of the option file, or published)",
    )
    parser.add_argument(
        "--paper",
        metavar="NAME",
        help=f"the paper's figures to set beside: {', '.join(PAPER_NAMES)} or {NO_PAPER} (recognised by the network)",
    )
    parser.add_argument("--baseline", metavar="FILE", help=f"an option file to compare images with, or {BICUBIC}")
    parser.add_argument(
        "--cost", type=Path, metavar="FILE", help="by basicsr benchmark cost --format json, for figures"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(that of the file)")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="as of basicsr test")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="as of basicsr test")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of what is printed (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="a new folder for tables in all formats and figures"
    )
    parser.add_argument("--no-figures", action="store_true", help="tables alone in FOLDER")


def run(args: argparse.Namespace) -> int:
    """Test, print a table and write FOLDER. Everything that can be wrong is looked for before the first test.

    Raises:
        UserError: something in the options, the data or a checkpoint cannot be used, or FOLDER is there.
    """
    draws = args.output is not None and not args.no_figures
    if args.output is not None and args.output.exists():
        raise UserError(f"{args.output} exists, and nothing is overwritten. Choose another folder with -o.")
    if draws:
        require_matplotlib()
    costs = _read_costs(args.cost) if args.cost else []
    trials, baseline = _trials(args, save_images=draws and args.baseline is not None)
    problems = data_problems(trials)
    for problem in problems:
        print_note(f"{problem} basicsr benchmark data says more.")
    outcomes = run_trials([*trials, *([baseline] if baseline else [])], args.launcher)
    if os.environ.get("RANK", "0") != "0":
        return 0
    results = [each for each in outcomes if each.trial is not baseline]
    below = [each for each in outcomes if each.trial is baseline] if baseline else BICUBIC
    gains = gains_over(results, below) if args.baseline else []
    tables = {"quality": quality_table(results, problems)}
    if args.baseline:
        tables["gains"] = gain_table(gains, Path(args.baseline).stem)
    _print(tables, args.format)
    if args.output is not None:
        args.output.mkdir(parents=True)
        _write_tables(args.output, tables | {"per_image": _per_image_table(results)})
    if draws:
        _write_figures(args.output, results, costs)
        _write_gains(args.output, gains, baseline)
    return 0


def _trials(args: argparse.Namespace, *, save_images: bool) -> tuple[list[Trial], Trial | None]:
    if args.weights is not None and len(args.weights) != len(args.opt):
        raise UserError(
            f"-m has {len(args.weights)} file(s) and -opt {len(args.opt)}: give one for each option file, in order."
        )
    common: dict[str, Any] = {
        "protocol": args.protocol,
        "device": args.device,
        "save_images": save_images,
        "force_yml": args.force_yml,
        "launcher": args.launcher,
    }
    weights = args.weights or [None] * len(args.opt)
    trials = [
        plan(file, weights=each, paper=args.paper, **common) for file, each in zip(args.opt, weights, strict=True)
    ]
    baseline = None
    if args.baseline not in (None, BICUBIC):
        baseline = plan(Path(args.baseline), paper=NO_PAPER, **common)
    _refuse_equal_names([*trials, *([baseline] if baseline else [])])
    return trials, baseline


def _refuse_equal_names(trials: Iterable[Trial]) -> None:
    seen: dict[str, Path] = {}
    for trial in trials:
        if trial.name in seen:
            raise UserError(
                f"{seen[trial.name]} and {trial.file} both have the name {trial.name}, and would share "
                f"results/{trial.name}. Give one of them another name."
            )
        seen[trial.name] = trial.file


# --- tables ---------------------------------------------------------------------------------------------------------


def _print(tables: Mapping[str, Table], form: str) -> None:
    """All of them to be read; to be read by programs, the first."""
    shown = list(tables.values()) if form in ("text", "markdown") else [tables["quality"]]
    print("\n".join(table.render(form) for table in shown), end="")


def _write_tables(folder: Path, tables: Mapping[str, Table]) -> None:
    endings = {"text": "txt", "markdown": "md", "csv": "csv", "json": "json"}
    for name, table in tables.items():
        for form in FORMATS:
            write_atomically(folder / f"{name}.{endings[form]}", table.render(form).encode())


def _per_image_table(results: Sequence[Outcome]) -> Table:
    names = list(dict.fromkeys(name for each in results for name in each.trial.opt["val"]["metrics"]))
    columns = [Column("network"), Column("dataset", "data set"), Column("image")]
    rows = [
        [each.trial.name, each.dataset, image, *(metrics.get(name) for name in names)]
        for each in results
        for image, metrics in each.images.items()
    ]
    return Table([*columns, *(Column(name, name.upper(), ".4f") for name in names)], rows)


# --- figures --------------------------------------------------------------------------------------------------------


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


def _write_figures(folder: Path, results: Sequence[Outcome], costs: Sequence[Mapping[str, Any]]) -> None:
    """PSNR against latency where `costs` has it, otherwise against multiply-adds, a figure for each scale."""
    scales = dict.fromkeys(each.trial.network.scale for each in results if _psnr(each) is not None)
    for scale in scales:
        of_scale = [each for each in results if each.trial.network.scale == scale]
        by_latency = _panels(of_scale, lambda each: _measured_cost(each.trial, costs))
        if by_latency:
            picture = draw_bubbles(by_latency, cost="latency, ms (area: memory)", quality="PSNR, dB")
            write_atomically(folder / f"psnr_against_latency_x{scale:g}.png", picture)
        else:
            panels = _panels(of_scale, lambda each: _counted_cost(each.trial))
            if not panels:  # networks of no one scale, and such as cannot be counted
                continue
            panels = {name: [*bubbles, *_paper_bubbles(name, scale)] for name, bubbles in panels.items()}
            label = "multiply-adds for an HD image, G (grey: the paper)"
            picture = draw_bubbles(panels, cost=label, quality="PSNR, dB")
            write_atomically(folder / f"psnr_against_multiply_adds_x{scale:g}.png", picture)


def _psnr(outcome: Outcome) -> float | None:
    names = (name for name, metric in outcome.trial.opt["val"]["metrics"].items() if metric["type"] == "calculate_psnr")
    return next((outcome.mean(name) for name in names), None)


def _panels(results: Sequence[Outcome], cost_of_one: Any) -> dict[str, list[Bubble]]:
    """Bubbles by data sets; networks without a cost are left out."""
    panels: dict[str, list[Bubble]] = {}
    for each in results:
        quality, found = _psnr(each), cost_of_one(each)
        if quality is not None and found is not None:
            panels.setdefault(each.dataset, []).append(Bubble(each.trial.name, found[0], quality, found[1]))
    return panels


def _measured_cost(trial: Trial, costs: Sequence[Mapping[str, Any]]) -> tuple[float, float | None] | None:
    """Latency and memory of a network from the report of `basicsr benchmark cost`."""
    names = (trial.name, trial.file.stem, trial.network.published)
    output = "x".join(map(str, output_size(_OUTPUT)))
    for record in costs:
        is_it = record["network"] in names and record["scale"] == trial.network.scale and record["output"] == output
        if is_it and isinstance(record["latency_ms"], int | float):
            return record["latency_ms"], record.get("memory_mib")
    return None


def _counted_cost(trial: Trial) -> tuple[float, None] | None:
    """Multiply-adds (10^9); None for a network that cannot be counted, which is no reason to lose a figure."""
    try:
        return cost_of(trial.network, output_size(_OUTPUT), None).operations.paper / 1e9, None
    except UserError:
        return None


def _paper_bubbles(dataset: str, scale: float) -> Iterator[Bubble]:
    for name in PAPER_NAMES:
        cost, quality = paper_cost(name, scale), paper_quality(name, dataset, scale).get("psnr")
        if cost is not None and quality is not None:
            yield Bubble(name, cost.gmacs, quality, measured=False)


def _write_gains(folder: Path, gains: Sequence[Gains], baseline: Trial | None) -> None:
    """Bars of all images for each network, and pictures of those where it gains and loses most."""
    below = baseline.name if baseline else BICUBIC
    for name in dict.fromkeys(each.outcome.trial.name for each in gains):
        panels = {each.outcome.dataset: each.images for each in gains if each.outcome.trial.name == name}
        write_atomically(folder / f"gains_{name}.png", draw_gains(panels, label=f"PSNR over {below}, dB"))
    for each in gains:
        _write_crops(folder / "crops" / each.outcome.trial.name / each.outcome.dataset, each, baseline)


def _write_crops(folder: Path, gains: Gains, baseline: Trial | None) -> None:
    trial, dataset = gains.outcome.trial, gains.outcome.dataset
    (best, most), (worst, least) = next(iter(gains.images.items())), list(gains.images.items())[-1]
    wanted = {image: kind for image, kind, shown in ((best, "gain", most > 0), (worst, "loss", least < 0)) if shown}
    folder.mkdir(parents=True)
    for image, enlarged, gt in bicubic_images(trial, dataset):
        if image not in wanted:
            continue
        result = cv2.imread(str(trial.picture(dataset, image)))
        other = cv2.imread(str(baseline.picture(dataset, image))) if baseline else enlarged
        panels: list[tuple[str, Any]] = [
            (baseline.name if baseline else BICUBIC, other),
            (f"{trial.name} {gains.images[image]:+.2f} dB", result),
        ]
        if wanted[image] == "loss":  # the detail is taken where the first differs most from the last
            panels.reverse()
        picture = side_by_side(dict([*panels, ("ground truth", gt)]))
        write_atomically(folder / f"most_{wanted[image]}_{image}.png", encode_png(picture))
