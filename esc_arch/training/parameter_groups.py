"""Which parameters of a network are trained, and how fast: `train: freeze` and `train: lr_factors`.

Both name parameters by shell patterns (`fnmatch`, case counts) on their full names, such as ``blocks.0.*``; a `*`
matches dots too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from esc_arch.errors import UserError
from esc_arch.problems import Problem

__all__ = ["freeze", "option_problems", "parameter_groups", "pattern_problems"]


def option_problems(train_options: Mapping[str, Any]) -> Iterator[Problem]:
    """Factors of `lr_factors` that are none."""
    factors = train_options.get("lr_factors")
    for pattern, factor in factors.items() if isinstance(factors, dict) else ():
        if not isinstance(factor, int | float) or isinstance(factor, bool) or factor <= 0:
            message = f"{factor!r} given; must be a number above 0. To keep it as it is: freeze"
            yield Problem(f"train:lr_factors:{pattern}", message)


def pattern_problems(net: nn.Module, train_options: Mapping[str, Any]) -> Iterator[Problem]:
    """Patterns of `freeze` and `lr_factors` that match nothing of a network, or change nothing."""
    names, kind = [name for name, _ in net.named_parameters()], type(net).__name__
    patterns, factors = _options(train_options)
    taken: set[str] = set()
    for key, pattern in [*(("freeze", each) for each in patterns), *(("lr_factors", each) for each in factors)]:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            message = (
                f"{pattern!r} matches no parameter of {kind}, which has {', '.join(names[:: max(1, len(names) // 5)])} "
                f"and others. Give a whole name, or a pattern such as 'blocks.0.*'"
            )
            yield Problem(f"train:{key}", message)
        elif key == "lr_factors" and matched <= taken:
            message = (
                f"{pattern!r} changes nothing: all that it matches is frozen or follows an earlier pattern. Put it "
                f"before the others, or take it out"
            )
            yield Problem("train:lr_factors", message)
        taken |= matched
        if key == "freeze" and len(taken) == len(names):
            yield Problem("train:freeze", f"{patterns} leave no parameter of {kind} to be trained. Take one out")


def freeze(net: nn.Module, train_options: Mapping[str, Any]) -> None:
    """Keep the parameters that `freeze` names as they are: they get no gradient.

    To be done before the network is wrapped for distributed training, which waits for every parameter's gradient.
    """
    patterns, _ = _options(train_options)
    for name, parameter in net.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def parameter_groups(net: nn.Module, train_options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The optimiser's groups of all parameters that are trained, in the network's order.

    Without `lr_factors` it is one group. With them, a group for what no pattern matches comes first, then one for each
    pattern, with ``lr`` = ``optim_g: lr`` times its factor; of several patterns that match a name the first counts.
    `net` is not wrapped for distributed training, so that its names are those of the checkpoints.

    UserError if a pattern matches nothing or changes nothing, or nothing is left to train.
    """
    if problems := list(pattern_problems(net, train_options)):
        raise UserError("; ".join(map(str, problems)) + ".")
    patterns, factors = _options(train_options)
    groups: dict[str, list[nn.Parameter]] = {"": [], **{pattern: [] for pattern in factors}}
    frozen = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups[next((pattern for pattern in factors if fnmatchcase(name, pattern)), "")].append(parameter)
        else:
            frozen.append(name)
    if frozen:
        by = f" by train: freeze: {', '.join(patterns)}" if patterns else ""
        logging.getLogger("basicsr").info("%d parameter tensors are frozen%s: %s.", len(frozen), by, ", ".join(frozen))
    if not factors:
        return [{"params": groups[""]}]
    rate = train_options["optim_g"]["lr"]
    return [{"params": group, "lr": rate * factors.get(pattern, 1)} for pattern, group in groups.items() if group]


def _options(train_options: Mapping[str, Any]) -> tuple[list[str], dict[str, float]]:
    return list(map(str, train_options.get("freeze") or [])), train_options.get("lr_factors") or {}
