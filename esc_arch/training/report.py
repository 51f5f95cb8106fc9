"""What a training leaves for a person to read at its end: a summary and curves, in the folder of the experiment."""

from __future__ import annotations

import datetime
import io
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import write_atomically

from .history import History
from .progress import losses_of

__all__ = ["write_report"]

logger = logging.getLogger("basicsr")

_FINAL = 10  # log lines that the final loss is the mean of: one batch says little
_COLUMNS = 2
_PANEL = (6.0, 2.6)  # inches
_RAW, _LINE, _BEST = "0.78", "#1f5a8a", "#b5432a"
_NO_PLOTS = 'Curves of the training are drawn when matplotlib is there: pip install "esc-arch[plot]"'

Record = Mapping[str, Any]
Points = tuple[list[int], list[float]]


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
        folder: of the experiment; the summary names other places relative to it.
        opt: the options of the run.
        history: its figures.
        seconds: what this run took, since its start or since it was resumed.
        skipped: steps that were left out because their loss was not finite.
        parameters: how many the network has.

    Returns:
        The summary, for the log.
    """
    text = ""
    with _warning_of(folder / "summary.md"):
        records = history.records()
        text = _summary(folder, opt, records, seconds=seconds, skipped=skipped, parameters=parameters)
        write_atomically(folder / "summary.md", text.encode())
    with _warning_of(folder / "training.png"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            logger.info(_NO_PLOTS)
            return text
        panels = [*_training_panels(records), *_metric_panels(records, opt)]
        if panels:
            write_atomically(folder / "training.png", _draw(panels, str(opt["name"])))
    return text


@contextmanager
def _warning_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, hours of training must not end with it
        logger.warning("%s could not be written: %s: %s", path, type(error).__name__, error)


# --- the summary ----------------------------------------------------------------------------------------------------


def _summary(
    folder: Path,
    opt: Mapping[str, Any],
    records: Sequence[Record],
    *,
    seconds: float,
    skipped: int,
    parameters: int | None,
) -> str:
    training = [record for record in records if "dataset" not in record]
    last = training[-_FINAL:]
    scale = f" x{opt['scale']}" if "scale" in opt else ""
    count = f", {parameters:,} parameters" if parameters is not None else ""
    rows = [
        ("network", f"{opt['network_g']['type']}{scale}{count}"),
        ("iterations", f"{max((record['iter'] for record in records), default=0):,} of {int(_total(opt)):,}"),
        ("time of this run", str(datetime.timedelta(seconds=round(seconds)))),
    ]
    if speeds := [record["images_per_s"] for record in training if record.get("images_per_s")]:
        rows.append(("images/s, median", f"{statistics.median(speeds):.1f}"))
    if memory := [record["memory_gib"] for record in training if record.get("memory_gib")]:
        rows.append(("peak memory", f"{max(memory):.2f} GiB"))
    for name in losses_of(last[-1]) if last else ():
        if values := [record[name] for record in last if record.get(name) is not None]:
            rows.append((f"final {name}", f"{statistics.fmean(values):.4e} (mean of the last {len(values)} logged)"))
    if skipped:
        rows.append(("skipped steps", f"{skipped:,} (their loss was not finite)"))
    parts = [f"# {opt['name']}", _table(("training", ""), rows)]
    if metrics := [_metric_row(*key, points, opt) for key, points in _metrics(records).items()]:
        parts.append(_table(("data set", "metric", "last", "at iteration", "best", "at iteration"), metrics))
    parts.append(_places(folder, opt))
    return "\n\n".join(parts) + "\n"


def _total(opt: Mapping[str, Any]) -> float:
    return float(opt["train"]["total_iter"])


def _metric_row(dataset: str, metric: str, points: Points, opt: Mapping[str, Any]) -> tuple[str, ...]:
    iterations, values = points
    best = _best(points, _better(opt, metric))
    return (
        dataset,
        metric,
        f"{values[-1]:.4f}",
        f"{iterations[-1]:,}",
        f"{values[best]:.4f}",
        f"{iterations[best]:,}",
    )


def _places(folder: Path, opt: Mapping[str, Any]) -> str:
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = [
        f"In {folder}:",
        "",
        f"- {_relative(opt['path'].get('models'), folder)}: checkpoints; net_g_latest.pth is the last",
        f"- {_relative(opt['path'].get('training_states'), folder)}: states to resume from",
        "- metrics.jsonl: all figures; training.png: their curves",
    ]
    return "\n".join(lines + ([f"- {logs[-1].name}: the log"] if logs else []))


def _relative(place: Any, folder: Path) -> str:
    path = Path(str(place))
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is one to the eye, too."""
    widths = [max(3, *(len(row[index]) for row in [head, *rows])) for index in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


# --- figures --------------------------------------------------------------------------------------------------------


def _metrics(records: Sequence[Record]) -> dict[tuple[str, str], Points]:
    """(data set, metric) -> iterations and finite values."""
    curves: dict[tuple[str, str], Points] = {}
    for record in records:
        for metric, value in record.items():
            if "dataset" in record and metric not in ("iter", "dataset") and isinstance(value, int | float):
                iterations, values = curves.setdefault((record["dataset"], metric), ([], []))
                iterations.append(record["iter"])
                values.append(value)
    return curves


def _better(opt: Mapping[str, Any], metric: str) -> str:
    metrics = (opt.get("val") or {}).get("metrics") or {}
    return str(metrics.get(metric, {}).get("better", "higher"))


def _best(points: Points, better: str) -> int:
    """Index of the best value, of equal ones the last, as BasicSR counts."""
    sign = 1 if better == "higher" else -1
    return max(range(len(points[1])), key=lambda index: (sign * points[1][index], index))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of a thirtieth of the curve, smaller at its ends; NaNs are left out."""
    means = []
    for index in range(len(values)):
        reach = min(len(values) // 60, index, len(values) - 1 - index)  # one-sided means would be late
        near = [value for value in values[index - reach : index + reach + 1] if not math.isnan(value)]
        means.append(statistics.fmean(near) if near else math.nan)
    return means


# --- curves ---------------------------------------------------------------------------------------------------------


class _Panel:
    """One diagram: a title and curves; `best` is the index of the point to mark, `raw` what is drawn behind them."""

    def __init__(self, title: str, curves: Sequence[Points], *, raw: Points | None = None, best: int | None = None):
        self.title, self.curves, self.raw, self.best = title, curves, raw, best

    @property
    def is_logarithmic(self) -> bool:
        """A loss that spans more than a decade."""
        values = [value for value in self.raw[1] if not math.isnan(value)] if self.raw else []
        return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _training_panels(records: Sequence[Record]) -> Iterator[_Panel]:
    training = [record for record in records if "dataset" not in record]
    names = dict.fromkeys(name for record in training for name in losses_of(record))
    for name in names:
        found = [record for record in training if name in record]
        iterations = [record["iter"] for record in found]
        values = [math.nan if record[name] is None else record[name] for record in found]
        yield _Panel(f"loss {name}", [(iterations, _smoothed(values))], raw=(iterations, values))
    if training:
        iterations = [record["iter"] for record in training]
        groups = zip(*(record.get("lrs") or [record["lr"]] for record in training), strict=False)
        yield _Panel("learning rate", [(iterations, list(rates)) for rates in groups])


def _metric_panels(records: Sequence[Record], opt: Mapping[str, Any]) -> Iterator[_Panel]:
    for (dataset, metric), points in _metrics(records).items():
        yield _Panel(f"{dataset}: {metric}", [points], best=_best(points, _better(opt, metric)))


def _draw(panels: Sequence[_Panel], name: str) -> bytes:
    """PNG of the panels, two to a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(_PANEL[0] * _COLUMNS, _PANEL[1] * rows + 0.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # not pyplot, which keeps figures and looks for a display
    figure.suptitle(name)
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, _COLUMNS, index + 1), panel)
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()


def _draw_panel(axes: Any, panel: _Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    if panel.raw:
        axes.plot(*panel.raw, color=_RAW, linewidth=0.6)
    for iterations, values in panel.curves:
        marker = "." if len(values) < 30 else None
        axes.plot(iterations, values, color=_LINE, linewidth=1.4, marker=marker)
    if panel.is_logarithmic:
        axes.set_yscale("log")
    if panel.best is not None:
        iterations, values = panel.curves[0]
        best = iterations[panel.best], values[panel.best]
        axes.plot(*best, "o", color=_BEST, markersize=5)
        axes.set_title(f"best {best[1]:.4f} at {best[0]:,}", fontsize=9, loc="right", color=_BEST)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("iteration", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker
