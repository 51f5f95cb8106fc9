"""What a training leaves for a person to read at its end: a summary and curves, in the folder of the experiment."""

from __future__ import annotations

import datetime
import io
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import write_atomically

from .history import History
from .progress import losses_of

__all__ = ["write_report"]

logger = logging.getLogger("basicsr")

#: Colour of the best score.
_BEST = "#b5432a"
_FINAL = 10  # log lines that the final loss is the mean of: one batch says little

Logged = Mapping[str, Any]
#: (data set, metric) -> the finite scores, as (iteration, value), the best of them, and that of bicubic interpolation.
Scores = dict[tuple[str, str], tuple[list[tuple[int, float]], tuple[int, float], float | None]]


def write_report(
    folder: Path,
    opt: Mapping[str, Any],
    history: History,
    seconds: float,
    iterations: int,
    skipped: int = 0,
    parameters: int | None = None,
) -> str:
    """Write `summary.md` and, where matplotlib is installed, `training.png` to the experiment's folder.

    Of a run of so many `seconds`, after `iterations` in all, steps `skipped` for gradients that were not finite, and
    `parameters` of the network. What goes wrong is a warning in the log: the training itself is done and saved. Returns
    the summary, for the log.
    """
    text = ""
    with _warning_of(folder / "summary.md"):
        records = history.records()
        training = [record for record in records if "dataset" not in record]
        scores = _scores(records, opt)
        scale = f" x{opt['scale']}" if "scale" in opt else ""
        count = f", {parameters:,} parameters" if parameters is not None else ""
        rows = [
            ("network", f"{opt['network_g']['type']}{scale}{count}"),
            ("iterations", f"{iterations:,} of {int(opt['train']['total_iter']):,}"),
            ("time of this run", str(datetime.timedelta(seconds=round(seconds)))),
            *_measured(training),
            *([("skipped steps", f"{skipped:,} (their loss was not finite)")] if skipped else []),
        ]
        parts = [f"# {opt['name']}", _table(("training", ""), rows)]
        if scores:
            cells = [
                (*key, f"{last:.4f}", f"{end:,}", f"{best:.4f}", f"{at:,}", f"{bicubic:.4f}" if bicubic else "-")
                for key, ((*_, (end, last)), (at, best), bicubic) in scores.items()
            ]
            head = ("data set", "metric", "last", "at iteration", "best", "at iteration", "bicubic")
            parts.append(_table(head, cells))
        text = "\n\n".join([*parts, f"In {folder}."]) + "\n"
        write_atomically(folder / "summary.md", text.encode())
    with _warning_of(folder / "training.png"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            logger.info('matplotlib draws curves of the training: pip install "esc-arch[plot]"')
            return text
        if records:
            picture = io.BytesIO()
            _draw(str(opt["name"]), training, scores).savefig(picture, format="png", dpi="figure")
            write_atomically(folder / "training.png", picture.getvalue())
    return text


@contextmanager
def _warning_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, hours of training must not end with it
        logger.warning("%s could not be written: %s: %s", path, type(error).__name__, error)


def _measured(training: Sequence[Logged]) -> Iterator[tuple[str, str]]:
    """Speed, memory and final losses, as far as they were logged."""
    if speeds := [record["images_per_s"] for record in training if record.get("images_per_s")]:
        yield "images/s, median", f"{statistics.median(speeds):.1f}"
    if memory := [record["memory_gib"] for record in training if record.get("memory_gib")]:
        yield "peak memory", f"{max(memory):.2f} GiB"
    last = training[-_FINAL:]
    for name in losses_of(last[-1]) if last else ():
        if values := [record[name] for record in last if record.get(name) is not None]:
            yield f"final {name}", f"{statistics.fmean(values):.4e} (mean of the last {len(values)} logged)"


def _scores(records: Sequence[Logged], opt: Mapping[str, Any]) -> Scores:
    """The scores of all validations; of equally good ones the last is the best, as BasicSR counts."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    bicubic: dict[tuple[str, str], float] = {}
    for record in records:
        for metric, value in record.items() if "dataset" in record else ():
            if metric == "bicubic" and isinstance(value, dict):
                bicubic |= {(record["dataset"], name): score for name, score in value.items() if score is not None}
            elif metric not in ("iter", "dataset") and isinstance(value, int | float):
                found[record["dataset"], metric].append((record["iter"], value))
    options = (opt.get("val") or {}).get("metrics") or {}
    signs = {metric: -1 if entry.get("better") == "lower" else 1 for metric, entry in options.items()}
    return {
        key: (points, max(points, key=lambda at: (signs.get(key[1], 1) * at[1], at[0])), bicubic.get(key))
        for key, points in found.items()
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text, too."""
    widths = [max(3, *(len(row[index]) for row in [head, *rows])) for index in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _draw(name: str, training: Sequence[Logged], scores: Scores) -> Any:
    """A figure of a panel for each loss, for the learning rates, and for each metric of each data set."""
    from matplotlib.figure import Figure

    losses = dict.fromkeys(loss for record in training for loss in losses_of(record))
    rows = math.ceil((len(losses) + bool(training) + len(scores)) / 2)
    figure = Figure(figsize=(12.0, 2.6 * rows + 0.4), layout="constrained")  # pyplot would look for a display
    figure.suptitle(name)

    def panel(title: str) -> Any:
        axes = figure.add_subplot(rows, 2, len(figure.axes) + 1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(True, color="0.92", linewidth=0.6)
        return axes

    def plot(axes: Any, iterations: Sequence[int], values: Sequence[float]) -> None:
        axes.plot(iterations, values, color="#1f5a8a", linewidth=1.4, marker="." if len(values) == 1 else None)

    for loss in losses:
        axes = panel(f"loss {loss}")
        logged = [record for record in training if record.get(loss) is not None]
        iterations, values = [record["iter"] for record in logged], [record[loss] for record in logged]
        axes.plot(iterations, values, color="0.78", linewidth=0.6)
        plot(axes, iterations, _smoothed(values))
        if 0 < 10 * min(values, default=0) < max(values, default=0):
            axes.set_yscale("log")
    if training:
        axes = panel("learning rate")
        for rates in zip(*(record.get("lrs") or [record["lr"]] for record in training), strict=False):
            plot(axes, [record["iter"] for record in training], rates)
    for key, (points, (iteration, value), bicubic) in scores.items():
        axes = panel(": ".join(key))
        plot(axes, *zip(*points, strict=True))
        axes.plot(iteration, value, "o", color=_BEST, markersize=5)
        if bicubic is not None:
            axes.axhline(bicubic, color="0.45", linewidth=1.0, linestyle="--", label=f"bicubic {bicubic:.4f}")
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(f"best {value:.4f} at {iteration:,}", fontsize=9, loc="right", color=_BEST)
    return figure


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of a thirtieth of the curve, smaller at its ends: one-sided means would be late."""
    reaches = (min(len(values) // 60, index, len(values) - 1 - index) for index in range(len(values)))
    return [statistics.fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
