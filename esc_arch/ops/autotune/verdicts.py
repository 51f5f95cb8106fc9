"""What a trial finds: whether a backend is exact, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

__all__ = ["MODES", "PRECISIONS", "Subject", "Verdict"]

#: How kernels multiply: float32 with all its bits and in TF32, and the half types.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MODES = ("inference", "training")


class Subject(NamedTuple):
    """What a verdict is on.

    Attributes:
        operation, backend: such as window attention and triton.
        network: a key of `NETWORKS`, whose shapes it was tried with.
        precision: a key of `PRECISIONS`.
        mode: one of `MODES`; training includes the gradients.
    """

    operation: str
    backend: str
    network: str
    precision: str
    mode: str


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
        failure: why the backend must not be taken; empty where it is exact.
        part: what the errors are of: the result, or the gradient, that is nearest to its limit.
        error, plain_error: largest difference from float64 of the backend and of plain PyTorch in the same precision.
        other: the backend that auto would take otherwise.
        milliseconds: by layout of the map, medians of the backend and of the other.
    """

    failure: str = ""
    part: str = ""
    error: float | None = None
    plain_error: float | None = None
    other: str = ""
    milliseconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def least_gain(self) -> Sequence[float]:
        """The two times, in the layout in which the backend gains least."""
        return min(self.milliseconds.values(), key=lambda times: times[1] / times[0])

    @property
    def cost(self) -> float:
        """Its time in parts of the other's, all layouts together."""
        return sum(own / other for own, other in self.milliseconds.values())

    @property
    def slower(self) -> str:
        """Why it is no gain; empty where it is the faster one in every layout."""
        own, other = self.least_gain
        return "" if own < other else f"slower than {self.other} here ({own:.3g} against {other:.3g} ms)"

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED, {self.failure}"
        own, other = self.least_gain
        speed = "faster" if not self.slower else "slower"
        return (
            f"exact (error {self.error:.1e}, plain PyTorch {self.plain_error:.1e}), {speed}: {own:.3g} against "
            f"{other:.3g} ms of {self.other}"
        )
