"""Choosing among the ways to compute an operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from esc_arch.errors import UserError
from esc_arch.ops.cpu import build_by_name

__all__ = ["Survey", "UnusableBackend", "choose", "explain_dispatch"]


class UnusableBackend(UserError, RuntimeError):
    """The backend asked for by name cannot take the inputs, or none can; the message lists every reason."""


def choose(
    what: str, backends: Mapping[str, ModuleType], order: Sequence[str], backend: str, *inputs: Any, option: str
) -> ModuleType:
    """The backend to compute an operation with.

    Args:
        what: the operation, for messages.
        backends: by name, modules with `unsupported_reasons(*inputs)`, empty when it can, and maybe with
            `auto_skip_reasons(*inputs)`: why auto skips a usable backend.
        order: what auto tries; the first one without any reasons is taken.
        backend: a name, which is taken or refused, or auto. The C++ operators are built when they are asked for so.
        inputs: what the operation is to be computed of.
        option: what the user sets to a name.

    Raises:
        ValueError: there is no such backend.
        UnusableBackend: the backend asked for by name cannot take these inputs.
    """
    if backend != "auto" and backend not in backends:
        raise ValueError(f"the {what} backend {backend!r} is not known; allowed: auto, {', '.join(backends)}.")
    if backend == "cpp":
        build_by_name()
    refusals = {}
    for name in order if backend == "auto" else (backend,):
        reasons = backends[name].unsupported_reasons(*inputs)
        if not reasons and backend == "auto":
            reasons = _reasons_against_auto(backends[name], inputs)
        if not reasons:
            return backends[name]
        refusals[name] = "; ".join(reasons)
    details = ". ".join(f"{name}: {reasons}" for name, reasons in refusals.items())
    raise UnusableBackend(f"{option} {backend} cannot run here. {details}. Use {option}: auto to have one chosen.")


def _reasons_against_auto(backend: ModuleType, inputs: tuple[Any, ...]) -> list[str]:
    ask = getattr(backend, "auto_skip_reasons", None)
    return [] if ask is None else ask(*inputs)


class Survey(NamedTuple):
    """What can compute an operation of given inputs.

    Attributes:
        chosen: the backend that auto takes; None where none can.
        reasons: why each cannot, by name; empty lists for those that can.
        auto_skip_reasons: why auto does not take those that can, by name; without those that it may take.
    """

    chosen: str | None
    reasons: dict[str, list[str]]
    auto_skip_reasons: dict[str, list[str]]


def explain_dispatch(backends: Mapping[str, ModuleType], order: Sequence[str], *inputs: Any) -> Survey:
    """Ask all backends; arguments as of `choose`. Nothing is built or computed."""
    reasons = {name: backend.unsupported_reasons(*inputs) for name, backend in backends.items()}
    left = {name: _reasons_against_auto(backends[name], inputs) for name, why in reasons.items() if not why}
    left = {name: why for name, why in left.items() if why}
    return Survey(next((name for name in order if not reasons[name] and name not in left), None), reasons, left)
