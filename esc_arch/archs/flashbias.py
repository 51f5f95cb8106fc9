"""Two conventions of FlashBias's factors, and how weights that have them are told apart.

Published ESC and ESC-Real add q k^T to the scores. esc_arch before 0.2 added q k^T / sqrt(rank), as ESC-RIB does, under
the same names and shapes. A state dict keeps the order in which its network made its parameters, and that order was
another one then: so weights of an earlier esc_arch are recognised, and converted when they are loaded.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, MutableMapping

from torch import Tensor

__all__ = ["Origin", "convert_old_factors", "mark_published", "origin_of"]


class Origin(enum.Enum):
    """Where factors come from, as far as the order of the state dict tells."""

    PUBLISHED = "the published code, or esc_arch from 0.2 on"
    OLD = "esc_arch before 0.2"
    UNKNOWN = "something that sorts names, as safetensors does"


def origin_of(names: Iterable[str], prefix: str = "") -> Origin:
    """The origin of a state dict with FlashBias's factors, by the order of its names.

    Args:
        names: of the state dict.
        prefix: of those that are the network's.
    """
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    block = f"blocks.{min((name.split('.')[1] for name in own if name.startswith('blocks.')), default='0')}."
    parts = list(dict.fromkeys(name.removeprefix(block).split(".")[0] for name in own if name.startswith(block)))
    factors = [place for place, name in enumerate(own) if ".flashbias_" in name]
    if factors and factors[0] == len(own) - len(factors):  # appended by `basicsr convert --flashbias-rank`
        return Origin.OLD
    order = [part for part in parts if part in ("attn", "convffns", "pconvs", "ln_out")]
    if order == ["attn", "convffns", "pconvs", "ln_out"]:
        return Origin.OLD
    return Origin.PUBLISHED if "convffns" not in order or order[1] == "pconvs" else Origin.UNKNOWN


def convert_old_factors(weights: MutableMapping[str, Tensor], prefix: str = "") -> None:
    """Bring factors of esc_arch before 0.2 into the published convention, in place."""
    for name in [name for name in weights if name.startswith(prefix) and name.endswith(".flashbias_q")]:
        q = weights[name]
        weights[name] = (q.double() * q.shape[-1] ** -0.5).to(q.dtype)
    mark_published(weights, prefix)


def mark_published(weights: MutableMapping[str, Tensor], prefix: str = "") -> None:
    """Put weights into the published order of names, in place: `origin_of` knows them by it."""
    for part in ("pconvs", "convffns", "ln_out", "conv_out"):
        for name in [name for name in weights if name.startswith(prefix) and f".{part}." in name]:
            weights[name] = weights.pop(name)
