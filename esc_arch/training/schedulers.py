"""Learning rate schedules by name: BasicSR's two, and those of torch.optim.lr_scheduler that need plain values only."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from esc_arch.errors import UserError
from esc_arch.names import did_you_mean

__all__ = ["BASICSR_SCHEDULERS", "SCHEDULERS", "TORCH_SCHEDULERS", "build_scheduler"]

BASICSR_SCHEDULERS: dict[str, type[LRScheduler]] = {
    "MultiStepLR": MultiStepRestartLR,
    "MultiStepRestartLR": MultiStepRestartLR,
    "CosineAnnealingRestartLR": CosineAnnealingRestartLR,
}
_OF_TORCH = (
    "ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LinearLR OneCycleLR PolynomialLR "
    "StepLR"
)
TORCH_SCHEDULERS: dict[str, type[LRScheduler]] = {name: getattr(lr_scheduler, name) for name in _OF_TORCH.split()}
#: By the names of option files; where torch has one of the same name, BasicSR's is meant.
SCHEDULERS = TORCH_SCHEDULERS | BASICSR_SCHEDULERS

#: Rates that are given once for all groups of an optimiser, though groups may have rates of their own.
_RATES = {"OneCycleLR": ("max_lr",), "CyclicLR": ("base_lr", "max_lr")}


class _OwnRate:
    """A schedule that goes on from its own last rate, not from that which a warm-up of BasicSR's put in its place.

    (BasicSR's own two go on from the warm-up's; published results were made with them.)
    """

    def step(self, epoch: int | None = None) -> None:
        schedule: Any = self
        for group, rate in zip(schedule.optimizer.param_groups, getattr(self, "_last_lr", ()), strict=False):
            group["lr"] = rate
        super().step(epoch)  # type: ignore[misc]


def build_scheduler(kind: str, optimizer: torch.optim.Optimizer, **options: Any) -> LRScheduler:
    """One of torch's schedules, stepped once an iteration; a warm-up replaces its rates but does not change later ones.

    Its constructor raises ValueError or TypeError for invalid options. Rates of OneCycleLR and CyclicLR are those of a
    group with the optimiser's own rate; groups of another rate get the same multiple of them.
    """
    if kind not in TORCH_SCHEDULERS:
        raise UserError(f"The schedule {kind!r} is not known. {did_you_mean(kind, SCHEDULERS)}.")
    groups = optimizer.param_groups
    for name in _RATES.get(kind, ()):
        if len(groups) > 1 and isinstance(options.get(name), int | float):
            options[name] = [options[name] * group["lr"] / optimizer.defaults["lr"] for group in groups]
    schedule: Any = type(kind, (_OwnRate, TORCH_SCHEDULERS[kind]), {})
    built: LRScheduler = schedule(optimizer, **options)
    return built
