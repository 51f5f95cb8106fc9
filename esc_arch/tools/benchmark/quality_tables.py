"""Tables of scores: compared with the paper, with a baseline, and image by image."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .paper import paper_scores
from .quality import SetScores, bicubic_scores
from .tables import Cell, Column, Row, Table

__all__ = ["Gains", "compute_gains", "gain_table", "per_image_table", "quality_table"]

#: The paper's metrics with the digits it prints. Scores agree if they differ by at most one and a half units of the
#: last digit: one unit, and half of one for rounding.
_PAPER_METRICS = {"calculate_psnr": ("psnr", 2), "calculate_ssim": ("ssim", 4)}
_UNITS = 1.5


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
        record[name] = mean = scores.mean(name)
        kind, digits = _PAPER_METRICS.get(metric["type"], ("", 4))
        if kind and not (metric.get("crop_border") == scores.border and metric.get("test_y_channel")):
            what = f"{evaluation.name}: val:metrics:{name} is not measured as in the paper on {scores.dataset}"
            notes.append(f"{what}, and is not compared.")
        elif mean is not None and kind in published:
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


class Gains(NamedTuple):
    """Differences in PSNR (dB) from a baseline on each image, the largest first."""

    scores: SetScores
    images: Mapping[str, float]


def compute_gains(results: Sequence[SetScores], baseline: Sequence[SetScores] | None) -> list[Gains]:
    """Gains of all results that have PSNR, over another network on the same images, or over bicubic (None)."""
    gains = []
    for each in results:
        for below in [bicubic_scores(each)] if baseline is None else baseline:
            if (below.dataset, below.scale) != (each.dataset, each.scale):
                continue
            differences = {
                image: scores[each.psnr] - below.images[image][below.psnr]
                for image, scores in each.images.items()
                if each.psnr in scores and below.psnr in below.images.get(image, {})
            }
            finite = [pair for pair in differences.items() if math.isfinite(pair[1])]
            if finite:
                gains.append(Gains(each, dict(sorted(finite, key=lambda pair: -pair[1]))))
    return gains


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
        (best, *_), (*_, worst) = each.images, each.images
        values = each.images.values()
        cells: list[Cell] = [each.scores.evaluation.name, each.scores.dataset, len(values), statistics.fmean(values)]
        cells += [sum(gain > 0 for gain in values), best, each.images[best], worst, each.images[worst]]
        rows.append({column.name: cell for column, cell in zip(columns, cells, strict=True)})
    return Table(columns, rows)
