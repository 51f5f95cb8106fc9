"""The paper's figures (arXiv 2503.06671, tables 2, 4, 6 and 7), as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["PaperCost", "paper_cost", "paper_tables"]


@dataclass(frozen=True)
class PaperCost:
    """What the paper says a network costs at an HD output (1280 x 720), batch 1, float32, on the GPU it used.

    Attributes:
        parameters_k: thousands of parameters.
        gmacs: 10^9 multiply-adds, which the paper calls FLOPs.
        latency_ms: milliseconds.
        memory_mb: MB of GPU memory.
    """

    parameters_k: float
    gmacs: float
    latency_ms: float
    memory_mb: float


@cache
def paper_tables() -> Mapping[str, Any]:
    """All of `paper_tables.json`; not to be changed. By training set, network and scale ("DIV2K", "ESC", "x4")."""
    tables: Mapping[str, Any] = json.loads((files(__package__) / "paper_tables.json").read_text(encoding="utf-8"))
    return tables


def paper_cost(network: str, scale: float, output: tuple[int, int] = (1280, 720)) -> PaperCost | None:
    """The paper's figures for a network by the paper's name; None where it has none.

    Args:
        output: width and height of the enlarged image.
    """
    figures = paper_tables()["DIV2K"].get(network, {}).get(f"x{scale:g}")
    if figures is None or output != (1280, 720):
        return None
    return PaperCost(figures["params_k"], figures["flops_g"], figures["latency_ms"], figures["memory_mb"])
