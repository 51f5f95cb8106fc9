"""The paper's numbers (arXiv 2503.06671, tables 2, 4, 6 and 7), as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from esc_arch.ops.resize import scale_pair

__all__ = ["HD", "PAPER_ROWS", "paper_cost", "paper_scores"]

#: Width and height of the enlarged images that the paper's costs are for.
HD = (1280, 720)
_LTE = "Arbitrary scale (ESC + LTE, PSNR)"


#: By training set, network and scale: ["DIV2K"]["ESC"]["x4"].
_TABLES: Mapping[str, Any] = json.loads((files(__package__) / "paper_tables.json").read_text(encoding="utf-8"))
#: Networks of the paper's tables. Those trained on more than DIV2K end in -DFLIP.
PAPER_ROWS = (*_TABLES["DIV2K"], *(f"{name}-DFLIP" for name in _TABLES["DFLIP"]), "ESC-LTE")


def paper_cost(network: str | None, scale: float, output: tuple[int, int] = HD) -> Mapping[str, float]:
    """What the paper says a network costs for an enlarged image of `output` (width, height); empty if nothing.

    `params_k` (thousands of parameters), `flops_g` (10^9 multiply-adds), `latency_ms` and `memory_mb` (on its GPU).
    """
    costs: Mapping[str, float] = _TABLES["DIV2K"].get(network, {}).get(f"x{scale:g}", {})
    return costs if output == HD else {}


def paper_scores(row: str | None, dataset: str, scale: Any) -> Mapping[str, float]:
    """The paper's psnr (dB) and ssim of a network of `PAPER_ROWS` on a data set, as far as it has them.

    The data set's name may end in the scale, such as Set5_x2; `scale` is a number, or those of height and width.
    """
    name, (down, across) = dataset.partition("_x")[0], scale_pair(scale)
    if row is None or down != across:
        return {}
    if row == "ESC-LTE":
        psnr = _TABLES[_LTE].get(name, {}).get(f"x{down:g}")
        return {} if psnr is None else {"psnr": psnr}
    training = "DFLIP" if row.endswith("-DFLIP") else "DIV2K"
    scores = _TABLES[training][row.removesuffix("-DFLIP")].get(f"x{down:g}")
    if scores is None or name not in _TABLES["datasets"]:
        return {}
    place = _TABLES["datasets"].index(name)
    return {metric: scores[metric][place] for metric in ("psnr", "ssim")}
