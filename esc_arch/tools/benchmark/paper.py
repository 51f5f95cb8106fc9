"""The paper's numbers (arXiv 2503.06671, tables 2, 4, 6 and 7), as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from esc_arch.ops.resize import scale_pair

__all__ = ["HD", "PAPER_ROWS", "paper_cost", "paper_scores", "paper_tables"]

#: Width and height of the enlarged images that the paper's costs are for.
HD = (1280, 720)
_LTE = "Arbitrary scale (ESC + LTE, PSNR)"


@cache
def paper_tables() -> Mapping[str, Any]:
    """`paper_tables.json`, by training set, network and scale: ["DIV2K"]["ESC"]["x4"]."""
    tables: Mapping[str, Any] = json.loads((files(__package__) / "paper_tables.json").read_text(encoding="utf-8"))
    return tables


#: Networks of the paper's tables. Those trained on more than DIV2K end in -DFLIP.
PAPER_ROWS = (*paper_tables()["DIV2K"], *(f"{name}-DFLIP" for name in paper_tables()["DFLIP"]), "ESC-LTE")


def paper_cost(network: str | None, scale: float, output: tuple[int, int] = HD) -> Mapping[str, float]:
    """What the paper says a network costs for an enlarged image of `output` (width, height); empty if nothing.

    Returns:
        `params_k` (thousands of parameters), `flops_g` (10^9 multiply-adds), `latency_ms` and `memory_mb` (on the GPU
        the paper used, in float32).
    """
    costs: Mapping[str, float] = paper_tables()["DIV2K"].get(network, {}).get(f"x{scale:g}", {})
    return costs if output == HD else {}


def paper_scores(row: str | None, dataset: str, scale: Any) -> Mapping[str, float]:
    """The paper's psnr (dB) and ssim of a network of `PAPER_ROWS` on a data set, as far as it has them.

    Args:
        dataset: its name, which may end in the scale, such as Set5_x2.
        scale: a number, or those of height and width.
    """
    tables, name, (down, across) = paper_tables(), dataset.partition("_x")[0], scale_pair(scale)
    if row is None or down != across:
        return {}
    if row == "ESC-LTE":
        psnr = tables[_LTE].get(name, {}).get(f"x{down:g}")
        return {} if psnr is None else {"psnr": psnr}
    training = "DFLIP" if row.endswith("-DFLIP") else "DIV2K"
    scores = tables[training][row.removesuffix("-DFLIP")].get(f"x{down:g}")
    if scores is None or name not in tables["datasets"]:
        return {}
    place = tables["datasets"].index(name)
    return {metric: scores[metric][place] for metric in ("psnr", "ssim")}
