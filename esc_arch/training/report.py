"""What a training leaves for a person to read at its end: a summary and curves, in the folder of the experiment."""

from __future__ import annotations

import datetime
import io
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import write_atomically

from .history import History
from .progress import losses_of

__all__ = ["write_report"]

logger = logging.getLogger("basicsr")

_FINAL = 10  # log lines that the final loss is the mean of: one batch says little

Record = Mapping[str, Any]


@dataclass
class _Curve:
    """Values by iteration; `best` is the index of the best value, of equal ones the last, as BasicSR counts."""

    title: str
    iterations: list[int]
    values: list[float]
    best: int | None = None
    is_loss: bool = False

    @property
    def is_logarithmic(self) -> bool:
        """True for a loss that spans more than a decade."""
        finite = [value for value in self.values if not math.isnan(value)]
        return self.is_loss and 0 < 10 * min(finite, default=0) < max(finite, default=0)


def write_report(
    folder: Path,
    opt: Mapping[str, Any],
    history: History,
    *,
    seconds: float,
    skipped: int = 0,
    parameters: int | None = None,
) -> str:
    """Write `summary.md` and, where matplotlib is installed, `training.png` to `folder`.

    What goes wrong is a warning in the log: the training itself is done and saved.

    Args:
        folder: of the experiment.
        opt, history: options and numbers of the run.
        seconds: what this run took, since its start or since it was resumed.
        skipped: steps that were left out because their loss was not finite.
        parameters: how many the network has.

    Returns:
        The summary, for the log.
    """
    text = ""
    with _warning_of(folder / "summary.md"):
        records = history.records()
        training = [record for record in records if "dataset" not in record]
        metrics = _metrics(records, opt)
        scale = f" x{opt['scale']}" if "scale" in opt else ""
        count = f", {parameters:,} parameters" if parameters is not None else ""
        done = max((record["iter"] for record in records), default=0)
        rows = [
            ("network", f"{opt['network_g']['type']}{scale}{count}"),
            ("iterations", f"{done:,} of {int(opt['train']['total_iter']):,}"),
            ("time of this run", str(datetime.timedelta(seconds=round(seconds)))),
            *_measured(training),
            *([("skipped steps", f"{skipped:,} (their loss was not finite)")] if skipped else []),
        ]
        parts = [f"# {opt['name']}", _table(("training", ""), rows)]
        if metrics:
            cells = []
            for key, curve in metrics.items():
                last, best = ((f"{curve.values[i]:.4f}", f"{curve.iterations[i]:,}") for i in (-1, curve.best or 0))
                cells.append((*key, *last, *best))
            parts.append(_table(("data set", "metric", "last", "at iteration", "best", "at iteration"), cells))
        text = "\n\n".join([*parts, f"In {folder}."]) + "\n"
        write_atomically(folder / "summary.md", text.encode())
    with _warning_of(folder / "training.png"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            logger.info('matplotlib draws curves of the training: pip install "esc-arch[plot]"')
            return text
        panels = [*_training_panels(training), *([curve] for curve in metrics.values())]
        if panels:
            write_atomically(folder / "training.png", _draw(panels, str(opt["name"])))
    return text


@contextmanager
def _warning_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, hours of training must not end with it
        logger.warning("%s could not be written: %s: %s", path, type(error).__name__, error)


def _measured(training: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Speed, memory and final losses, as far as they were logged."""
    if speeds := [record["images_per_s"] for record in training if record.get("images_per_s")]:
        yield "images/s, median", f"{statistics.median(speeds):.1f}"
    if memory := [record["memory_gib"] for record in training if record.get("memory_gib")]:
        yield "peak memory", f"{max(memory):.2f} GiB"
    last = training[-_FINAL:]
    for name in losses_of(last[-1]) if last else ():
        if values := [record[name] for record in last if record.get(name) is not None]:
            yield f"final {name}", f"{statistics.fmean(values):.4e} (mean of the last {len(values)} logged)"


def _metrics(records: Sequence[Record], opt: Mapping[str, Any]) -> dict[tuple[str, str], _Curve]:
    """(data set, metric) -> the finite values, with the best."""
    curves: dict[tuple[str, str], _Curve] = {}
    for record in records:
        for metric, value in record.items() if "dataset" in record else ():
            if metric not in ("iter", "dataset") and isinstance(value, int | float):
                title = f"{record['dataset']}: {metric}"
                curve = curves.setdefault((record["dataset"], metric), _Curve(title, [], []))
                curve.iterations.append(record["iter"])
                curve.values.append(value)
    options = (opt.get("val") or {}).get("metrics") or {}
    for (_, metric), curve in curves.items():
        sign = -1 if options.get(metric, {}).get("better") == "lower" else 1
        curve.best = max(range(len(curve.values)), key=lambda i: (sign * curve.values[i], i))
    return curves


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text, too."""
    widths = [max(3, *(len(row[index]) for row in [head, *rows])) for index in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _training_panels(training: Sequence[Record]) -> Iterator[list[_Curve]]:
    """A panel for each loss, and one for the learning rates of all groups."""
    for name in dict.fromkeys(name for record in training for name in losses_of(record)):
        found = [record for record in training if name in record]
        values = [math.nan if record[name] is None else record[name] for record in found]
        yield [_Curve(f"loss {name}", [record["iter"] for record in found], values, is_loss=True)]
    if training:
        iterations = [record["iter"] for record in training]
        groups = zip(*(record.get("lrs") or [record["lr"]] for record in training), strict=False)
        yield [_Curve("learning rate", iterations, list(rates)) for rates in groups]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of a thirtieth of the curve, smaller at its ends; NaNs are left out."""
    means = []
    for index in range(len(values)):
        reach = min(len(values) // 60, index, len(values) - 1 - index)  # one-sided means would be late
        near = [value for value in values[index - reach : index + reach + 1] if not math.isnan(value)]
        means.append(statistics.fmean(near) if near else math.nan)
    return means


def _draw(panels: Sequence[Sequence[_Curve]], name: str) -> bytes:
    """PNG of the panels, two to a row."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12.0, 2.6 * rows + 0.4), layout="constrained")  # pyplot would look for a display
    figure.suptitle(name)
    for index, curves in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, 2, index + 1), curves)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi="figure")
    return picture.getvalue()


def _draw_panel(axes: Any, curves: Sequence[_Curve]) -> None:
    from matplotlib import ticker

    axes.set_title(curves[0].title, fontsize=10, loc="left")
    for curve in curves:
        values = _smoothed(curve.values) if curve.is_loss else curve.values
        if curve.is_loss:
            axes.plot(curve.iterations, curve.values, color="0.78", linewidth=0.6)
        marker = "." if len(values) < 30 else None
        axes.plot(curve.iterations, values, color="#1f5a8a", linewidth=1.4, marker=marker)
        if curve.is_logarithmic:
            axes.set_yscale("log")
        if curve.best is not None:
            iteration, value, colour = curve.iterations[curve.best], curve.values[curve.best], "#b5432a"
            axes.plot(iteration, value, "o", color=colour, markersize=5)
            axes.set_title(f"best {value:.4f} at {iteration:,}", fontsize=9, loc="right", color=colour)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("iteration", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
