"""Figures of benchmarks: quality against cost, gains image by image, and the images of most gain and most loss."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esc_arch.errors import UserError

__all__ = ["Bubble", "draw_bubbles", "draw_gains", "require_matplotlib"]

_COLUMNS = 3
_PANEL = (5.0, 3.8)  # inches
_OURS, _OTHERS, _LOSS = "#1f5a8a", "0.55", "#b5432a"
#: Area (points squared) of the largest bubble, and of one whose memory is not known.
_LARGEST, _UNKNOWN = 900.0, 60.0
_LABELS = 40  # of bars; more cannot be read


@dataclass(frozen=True)
class Bubble:
    """A network in a diagram.

    Attributes:
        label: its name.
        cost, quality: where it is.
        memory: what its area stands for; None where it is not known.
        measured: whether it was measured here, and not by the paper.
    """

    label: str
    cost: float
    quality: float
    memory: float | None = None
    measured: bool = True


def require_matplotlib() -> None:
    """Raises UserError: matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            'Figures need matplotlib, which is not installed: pip install "esc-arch[plot]", or leave them out with '
            "--no-figures."
        ) from None


def draw_bubbles(panels: Mapping[str, Sequence[Bubble]], *, cost: str, quality: str) -> bytes:
    """PNG with a diagram for each data set.

    Args:
        panels: networks by titles.
        cost, quality: what the axes are, with units; that of cost is logarithmic.
    """
    figure, canvas = _figure(len(panels))
    memories = [bubble.memory for bubbles in panels.values() for bubble in bubbles if bubble.memory]
    rows = math.ceil(len(panels) / _COLUMNS)
    for index, (title, bubbles) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, min(len(panels), _COLUMNS), index + 1)
        for bubble in bubbles:
            area = _LARGEST * bubble.memory / max(memories) if bubble.memory else _UNKNOWN
            color = _OURS if bubble.measured else _OTHERS
            face = color if bubble.measured else "none"
            axes.scatter(bubble.cost, bubble.quality, s=area, edgecolors=color, facecolors=face, alpha=0.8)
            axes.annotate(
                bubble.label, (bubble.cost, bubble.quality), (4, 6), textcoords="offset points", fontsize=8, color=color
            )
        axes.set_xscale("log")
        axes.margins(0.25)
        axes.set_xlabel(cost, fontsize=9)
        axes.set_ylabel(quality, fontsize=9)
        _plain(axes, title)
    return _png(canvas)


def draw_gains(panels: Mapping[str, Mapping[str, float]], *, label: str) -> bytes:
    """PNG with bars of each image's gain for each data set, which are titles."""
    figure, canvas = _figure(len(panels))
    rows = math.ceil(len(panels) / _COLUMNS)
    for index, (title, gains) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, min(len(panels), _COLUMNS), index + 1)
        colors = [_OURS if gain >= 0 else _LOSS for gain in gains.values()]
        axes.bar(range(len(gains)), list(gains.values()), color=colors, width=0.85)
        if len(gains) <= _LABELS:
            axes.set_xticks(range(len(gains)), list(gains), rotation=90, fontsize=7)
        else:
            axes.set_xlabel(f"{len(gains)} images", fontsize=9)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_ylabel(label, fontsize=9)
        _plain(axes, title)
    return _png(canvas)


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = min(panels, _COLUMNS), math.ceil(panels / _COLUMNS)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    return figure, FigureCanvasAgg(figure)  # not pyplot, which keeps figures and looks for a display


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(canvas: Any) -> bytes:
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
