"""`basicsr benchmark quality`: PSNR and SSIM of networks, compared with the paper and with a baseline."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import new_folder, read_regular, write_atomically
from esc_arch.errors import UserError
from esc_arch.training.distributed import print_note
from esc_arch.training.run_locks import run_locks

from .data import KNOWN_SETS, check_folders, paired_folders
from .evaluation import Evaluation, Gains, SetScores, compute_gains, plan_evaluation, run_all
from .paper import paper_scores
from .plots import plot_gains, plot_quality, require_matplotlib, write_crops
from .tables import TABLE_FORMATS, Cell, Column, Row, Table

__all__ = ["run"]

BICUBIC = "bicubic"
#: LR images of a set that are compared with HR before a test; `basicsr benchmark data` compares all.
_IMAGES_CHECKED = 3
#: The paper's metrics with the digits it prints. Scores agree if they differ by at most one and a half units of the
#: last digit: one unit, and half of one for rounding.
_PAPER_METRICS = {"calculate_psnr": ("psnr", 2), "calculate_ssim": ("ssim", 4)}
_UNITS = 1.5


@run_locks()  # what the tests wrote is read to the end
def run(args: argparse.Namespace) -> int:
    """Test, print a table and write FOLDER; raises UserError before the first test if something cannot be used."""
    draws = args.output is not None and not args.no_figures
    if args.output is not None:
        _check_new(args.output)
        existing = next(path for path in args.output.absolute().parents if os.path.lexists(path))
        with _writing(args.output), tempfile.TemporaryDirectory(prefix=f".{args.output.name}.", dir=existing):
            pass
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
    run_all([*evaluations, *([baseline] if baseline else [])])
    if os.environ.get("RANK", "0") != "0":
        return 0
    results = [scores for each in evaluations for scores in each.read_scores()]
    gains = compute_gains(results, baseline) if args.baseline else []
    tables = {"quality": quality_table(results, problems)}
    if args.baseline:
        tables["gains"] = gain_table(gains, Path(args.baseline).stem)
    shown = [*tables.values()] if args.format in ("text", "markdown") else [tables["quality"]]
    print("\n".join(table.render(args.format) for table in shown), end="")
    if args.output is None:
        return 0
    with _writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(args.output.absolute(), lambda: _check_new(args.output)) as folder:
            for name, table in {**tables, "per_image": per_image_table(results)}.items():
                for form, ending in zip(TABLE_FORMATS, ("txt", "md", "csv", "json"), strict=True):
                    write_atomically(folder / f"{name}.{ending}", table.render(form).encode())
            if draws:
                plot_quality(folder, results, costs)
                plot_gains(folder, gains, baseline.name if baseline else BICUBIC)
                for each in gains:
                    write_crops(folder / "crops" / each.scores.evaluation.name / each.scores.dataset, each, baseline)
    return 0


def _check_new(folder: Path) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists, and nothing is overwritten. Choose another folder with -o.")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another folder with -o.") from error


def _plan(args: argparse.Namespace, *, save_images: bool) -> list[Evaluation]:
    """The evaluations of the option files, and last that of the baseline, if it is a network."""
    if args.weights is not None and len(args.weights) != len(args.opt):
        raise UserError(
            f"-m has {len(args.weights)} file(s) and -opt {len(args.opt)}: give one for each option file, in order."
        )
    forced = [*args.force_yml, *(["val:save_img=true"] if save_images else [])]
    if args.device != "auto":
        forced.append(f"num_gpu={int(args.device == 'cuda')}")
    files = [*args.opt, *([Path(args.baseline)] if args.baseline not in (None, BICUBIC) else [])]
    planned: dict[str, Evaluation] = {}
    for file, weights in zip_longest(files, args.weights or ()):
        entries = forced if weights is None else [*forced, f"path:pretrain_network_g={json.dumps(weights)}"]
        new = plan_evaluation(file, entries, protocol=args.protocol, paper=args.paper, launcher=args.launcher)
        if not (new.opt.get("path") or {}).get("pretrain_network_g"):
            raise UserError(
                f"{file} names no weights, and an untrained network says nothing: give path:pretrain_network_g, or -m "
                "for the files of -opt."
            )
        if new.name in planned:
            raise UserError(
                f"{planned[new.name].file} and {file} both have the name {new.name}, and would share "
                f"results/{new.name}. Give one of them another name."
            )
        planned[new.name] = new
    return list(planned.values())


def _read_costs(file: Path) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(read_regular(file, pipes=True))
        if not all({"network", "scale", "output", "latency_ms"} <= record.keys() for record in records):
            raise ValueError("a record has no latency")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--cost {file} cannot be used: {error}. Make it with: basicsr benchmark cost --format json -o {file}"
        ) from None
    return list(records)


# --- tables ---------------------------------------------------------------------------------------------------------


def quality_table(results: Sequence[SetScores], problems: Sequence[str] = ()) -> Table:
    """Means over data sets compared with the paper; `problems` of the data are added to the notes."""
    columns = [Column("network"), Column("protocol"), Column("scale", style="g"), Column("dataset", "data set")]
    columns.append(Column("images", style="d"))
    for name, metric in {name: metric for each in results for name, metric in each.metrics.items()}.items():
        kind, digits = _PAPER_METRICS.get(metric["type"], ("", 4))
        columns.append(Column(name, name.upper(), ".3f" if kind == "psnr" else ".4f"))
        if kind:
            columns.append(Column(f"{name}_paper", "paper", f".{digits}f"))
            columns.append(Column(f"{name}_difference", "difference", f"+.{max(digits, 3)}f"))
    columns += [Column("paper", "row of the paper"), Column("agrees")]
    notes = [
        "The paper: PSNR (dB) and SSIM on Y, as many pixels cropped at the border as the scale. Scores agree if all "
        f"differ by at most {_UNITS} units of the last digit in the paper."
    ]
    records = [_quality_record(each, notes) for each in results]
    if any(each.evaluation.protocol == "ensemble" and each.evaluation.paper for each in results):
        notes.append("The paper's scores are without self-ensemble.")
    return Table(columns, records, [*notes, *problems])


def _quality_record(scores: SetScores, notes: list[str]) -> Row:
    """The record of a data set; what is not compared with the paper, and why, is added to the notes."""
    evaluation, scale = scores.evaluation, scores.scale
    record: dict[str, Cell] = {
        "network": evaluation.name,
        "protocol": evaluation.protocol,
        "scale": scale if isinstance(scale, int | float) else " x ".join(map(str, scale)),
        "dataset": scores.dataset,
        "images": len(scores.images),
        "paper": evaluation.paper or "no published scores",
    }
    published = paper_scores(evaluation.paper, scores.dataset, scale)
    agree = []
    for name, metric in scores.metrics.items():
        record[name] = mean = statistics.fmean(image[name] for image in scores.images.values())
        kind, digits = _PAPER_METRICS.get(metric["type"], ("", 4))
        if kind and not (metric.get("crop_border") == scores.border and metric.get("test_y_channel")):
            what = f"{evaluation.name}: val:metrics:{name} is not measured as in the paper on {scores.dataset}"
            notes.append(f"{what}, and is not compared.")
        elif kind in published:
            difference = mean - published[kind]
            record |= {f"{name}_paper": published[kind], f"{name}_difference": difference}
            agree.append(abs(difference) <= _UNITS * 10**-digits)
    return record | {"agrees": ("yes" if all(agree) else "no") if agree else None}


def per_image_table(results: Sequence[SetScores]) -> Table:
    """The metrics of each image."""
    names = dict.fromkeys(name for each in results for name in each.metrics)
    columns = [Column("network"), Column("dataset", "data set"), Column("image")]
    records: list[Row] = [
        {"network": each.evaluation.name, "dataset": each.dataset, "image": image, **metrics}
        for each in results
        for image, metrics in each.images.items()
    ]
    return Table([*columns, *(Column(name, name.upper(), ".4f") for name in names)], records)


def gain_table(gains: Sequence[Gains], baseline: str) -> Table:
    """Mean gain in PSNR, and the images of largest and smallest gain."""
    columns = (
        Column("network"),
        Column("dataset", "data set"),
        Column("images", style="d"),
        Column("gain_db", f"gain over {baseline} (dB)", "+.3f"),
        Column("better", "images better", "d"),
        Column("most_gained", "best on"),
        Column("most_gained_db", "by (dB)", "+.3f"),
        Column("least_gained", "worst on"),
        Column("least_gained_db", "by (dB)", "+.3f"),
    )
    rows: list[Row] = []
    for each in gains:
        (best, *_), (*_, worst), values = each.images, each.images, each.images.values()
        rows.append(
            {
                "network": each.scores.evaluation.name,
                "dataset": each.scores.dataset,
                "images": len(values),
                "gain_db": statistics.fmean(values),
                "better": sum(gain > 0 for gain in values),
                "most_gained": best,
                "most_gained_db": each.images[best],
                "least_gained": worst,
                "least_gained_db": each.images[worst],
            }
        )
    return Table(columns, rows)
