"""Plots of scores: PSNR against cost, gains image by image, and crops of the images of most gain and loss."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from esc_arch.atomic_io import write_atomically
from esc_arch.data.image_files import encode_png, read_image
from esc_arch.errors import UserError
from esc_arch.models.comparison import side_by_side
from esc_arch.training.distributed import print_note

from .cost import network_cost
from .evaluation import Evaluation, Gains, SetScores, bicubic_images
from .paper import PAPER_ROWS, paper_cost, paper_scores

__all__ = ["plot_gains", "plot_quality", "require_matplotlib", "write_crops"]

_COLUMNS = 3
_PANEL = (5.0, 3.8)  # inches
_OURS, _PAPER, _LOSS = "#1f5a8a", "0.55", "#b5432a"
_AREA, _LARGEST = 60.0, 900.0  # square points
_MOST_LABELS = 40  # of bars; more cannot be read


def require_matplotlib() -> None:
    """Raises UserError: matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            'Plots need matplotlib, which is not installed: pip install "esc-arch[plot]", or omit them: --no-figures.'
        ) from None


def plot_quality(folder: Path, results: Sequence[SetScores], costs: Sequence[Mapping[str, Any]]) -> None:
    """PSNR against latency in `costs`, or without any against multiply-adds: a PNG for each scale.

    `costs` are records of `basicsr benchmark cost --format json`.
    """
    name, key, label = "latency", "latency_ms", "latency, ms (area: memory)"
    if not costs:
        name, key, label = "multiply_adds", "paper_convention_g", "multiply-adds for an HD image, G (grey: the paper)"
    most_memory = max((cost.get("memory_mib") or 0 for cost in costs), default=0)
    networks = {each.evaluation.name: each.evaluation for each in results if each.psnr}
    cost_of = {name: _cost_of(evaluation, costs) for name, evaluation in networks.items()}
    by_scale: dict[float, list[tuple[SetScores, Mapping[str, Any]]]] = {}
    for each in results:
        if cost := cost_of.get(each.evaluation.name):
            by_scale.setdefault(each.evaluation.network.scale, []).append((each, cost))
    for scale, plotted in by_scale.items():
        datasets = dict.fromkeys(each.dataset for each, _ in plotted)
        with _panels(folder / f"psnr_against_{name}_x{scale:g}.png", datasets) as panels:
            for each, cost in plotted:
                area = _LARGEST * cost["memory_mib"] / most_memory if cost.get("memory_mib") else _AREA
                _add_point(panels[each.dataset], each.evaluation.name, cost[key], fmean(each.psnr.values()), area)
            for dataset, axes in panels.items():
                for row in PAPER_ROWS if name == "multiply_adds" else ():
                    published, scores = paper_cost(row, scale), paper_scores(row, dataset, scale)
                    if published and scores:
                        _add_point(axes, row, published["flops_g"], scores["psnr"], color=_PAPER)
                axes.set_xscale("log")
                axes.margins(0.25)
                axes.set_xlabel(label, fontsize=9)
                axes.set_ylabel("PSNR, dB", fontsize=9)


def _add_point(axes: Any, label: str, x: float, y: float, area: float = _AREA, color: str = _OURS) -> None:
    axes.scatter(x, y, s=area, edgecolors=color, facecolors="none" if color == _PAPER else color, alpha=0.8)
    axes.annotate(label, (x, y), (4, 6), textcoords="offset points", fontsize=8, color=color)


def _cost_of(evaluation: Evaluation, costs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of a network that has its latency, or without `costs` its operations; empty if there is none."""
    network, names = evaluation.network, (evaluation.name, evaluation.file.stem, evaluation.network.published)
    if not costs:
        with suppress(UserError):  # a network of any scale
            return network_cost(network)
    for cost in costs:
        is_same = cost["network"] in names and cost["scale"] == network.scale and cost["output"] == "1280x720"
        if is_same and isinstance(cost["latency_ms"], int | float):
            return cost
    print_note(f"{evaluation.name} is not plotted: its cost at x{network.scale:g} and 1280x720 is not known.")
    return {}


def plot_gains(folder: Path, gains: Sequence[Gains], baseline: str) -> None:
    """Bars of the gains of all images: a PNG for each network."""
    for name in dict.fromkeys(each.scores.evaluation.name for each in gains):
        by_dataset = {each.scores.dataset: each.images for each in gains if each.scores.evaluation.name == name}
        with _panels(folder / f"gains_{name}.png", by_dataset) as panels:
            for dataset, images in by_dataset.items():
                axes, colors = panels[dataset], [_OURS if gain >= 0 else _LOSS for gain in images.values()]
                axes.bar(range(len(images)), list(images.values()), color=colors, width=0.85)
                if len(images) <= _MOST_LABELS:
                    axes.set_xticks(range(len(images)), list(images), rotation=90, fontsize=7)
                else:
                    axes.set_xlabel(f"{len(images)} images", fontsize=9)
                axes.axhline(0, color="0.3", linewidth=0.8)
                axes.set_ylabel(f"PSNR over {baseline}, dB", fontsize=9)


@contextmanager
def _panels(file: Path, titles: Collection[str]) -> Iterator[dict[str, Any]]:
    """Axes by their titles, to be drawn in; then the PNG is written."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    columns, rows = min(len(titles), _COLUMNS), math.ceil(len(titles) / _COLUMNS)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    panels = {title: figure.add_subplot(rows, columns, index) for index, title in enumerate(titles, start=1)}
    for title, axes in panels.items():
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(True, color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    yield panels
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(file, png.getvalue())


def write_crops(folder: Path, gains: Gains, baseline: Evaluation | None) -> None:
    """Pictures of the images where a network gains and loses most over a baseline, or over bicubic (None)."""
    evaluation, dataset = gains.scores.evaluation, gains.scores.dataset
    (best, *_), (*_, worst) = gains.images, gains.images
    folder.mkdir(parents=True)
    for image, bicubic, gt in bicubic_images(gains.scores):
        gain = gains.images.get(image, 0.0)
        if not ((image == best and gain > 0) or (image == worst and gain < 0)):
            continue
        below: Any = read_image(baseline.result_file(dataset, image)) if baseline else bicubic
        result: Any = read_image(evaluation.result_file(dataset, image))
        name = baseline.name if baseline else "bicubic"
        shown = {name: below, f"{evaluation.name} {gain:+.2f} dB": result, "ground truth": gt}
        file = folder / f"most_{'gain' if gain > 0 else 'loss'}_{image}.png"
        write_atomically(file, encode_png(side_by_side(shown, worst=int(gain < 0))))
