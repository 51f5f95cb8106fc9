"""Weights into networks: adapted where a network can, and checked before they are used.

What does not fit is reported in full instead of being skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from esc_arch.archs.base import ESCFamily
from esc_arch.archs.shapes import some
from esc_arch.errors import UserError

from .recognition import describe_difference, own_names

__all__ = ["adapt_weights", "describe_mismatch", "load_weights", "mismatch_message"]

logger = logging.getLogger("basicsr")


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], *, strict: bool, source: str | Path) -> None:
    """Load a state dict into a network, and say what does not fit.

    A network that can adapt a checkpoint (of another scale or window) does so first: it has a method
    `adapt_state_dict(state_dict) -> notes`, see `esc_arch.archs.ESC.adapt_state_dict`.

    Args:
        strict: every name and shape must be the same. Otherwise what fits is loaded, the rest is listed as a warning.

    Raises:
        UserError: it does not fit (strict), or nothing of it fits.
    """
    weights = dict(weights)
    for note in adapt_weights(net, weights):
        logger.warning("%s is of %s", source, note)
    message = mismatch_message(net, weights, strict=strict, source=source)
    if message is not None:
        raise UserError(message)
    own = net.state_dict()
    fitting = _fitting(own, weights)
    if problems := _problems(own, weights):
        logger.warning("Of %s, %d of %d tensors were loaded: %s.", source, len(fitting), len(own), problems)
    net.load_state_dict(fitting, strict=False)


def mismatch_message(net: nn.Module, weights: Mapping[str, Tensor], *, strict: bool, source: str | Path) -> str | None:
    """Why a state dict, adapted already, cannot be loaded into a network; None when it can."""
    own = net.state_dict()
    problems = _problems(own, weights)
    fitting = len(_fitting(own, weights))
    if not fitting:
        return (
            f"Nothing in {source} fits {type(net).__name__}, so it would stay untrained: {problems}. "
            f"Is it a checkpoint of another network? Compare network_g."
        )
    conflict = net.conflict_with(weights) if isinstance(net, ESCFamily) else None
    if conflict is not None:
        return f"{source} does not fit {type(net).__name__}: {problems}. {conflict}"
    if problems and strict:
        return (
            f"{source} does not fit {type(net).__name__}: {problems}. Make network_g that of the checkpoint, or set "
            f"path: strict_load_g: false to load only what fits ({fitting} of {len(own)} tensors)."
        )
    return None


def _problems(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """How weights differ from a network's, by its options where they tell and by name; empty when they fit."""
    problems = "; ".join(describe_mismatch(own, weights))
    difference = describe_difference(own, weights) if problems else None
    return problems if difference is None else f"{difference}; {problems}"


def adapt_weights(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Make `weights` fit the network in place where that can be; what the network did, a sentence each.

    When no name fits, they are replaced by this package's (`own_names`); then the network adapts them.
    """
    own = net.state_dict()
    if own.keys().isdisjoint(weights) and not own.keys().isdisjoint(renamed := own_names(weights)):
        weights.clear()
        weights.update(renamed)
    adapt = getattr(net, "adapt_state_dict", None)
    return adapt(weights) if callable(adapt) else []


def describe_mismatch(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """How a state dict differs from a network's: missing and unknown names, other shapes and types, if it does."""
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(tensor.shape)} and should be {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    types = [
        f"{name} is {tensor.dtype} and should be {own[name].dtype}: save it as such"
        for name, tensor in weights.items()
        if name in own and own[name].is_floating_point() != tensor.is_floating_point()
    ]
    groups = {
        "missing in it": missing,
        "not in the network": unknown,
        "of other shapes": shapes,
        "of other types": types,
    }
    return [f"{len(names)} {what} ({some(names)})" for what, names in groups.items() if names]


def _fitting(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def fits(tensor: Tensor, to: Tensor | None) -> bool:
        return to is not None and to.shape == tensor.shape and to.is_floating_point() == tensor.is_floating_point()

    return {name: tensor for name, tensor in weights.items() if fits(tensor, own.get(name))}
