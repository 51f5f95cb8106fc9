"""A trial of a backend: is it exact, is it the same each time, and how fast is it beside what auto would take?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.float32 import float32_products

from .comparison import allowed_error, largest_difference, results
from .networks import Network, Size
from .operations import LAYOUTS, OPERATIONS, Where
from .verdicts import PRECISIONS, Subject, Verdict

__all__ = ["ROUNDS", "examine"]

#: Of TF32's ten bits.
TF32_EPS = 2.0**-10
#: Of each backend, in turns; calls of a round last at least so many seconds together.
ROUNDS, LEAST_ROUND = 9, 0.02


def examine(subject: Sequence[str], shapes: dict[str, Any], device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Try a backend.

    Args:
        subject: a `Subject`.
        shapes: a `Network` as a dictionary.
        device: such as cuda:0.
        rounds: of timing.

    Returns:
        A `Verdict` as a dictionary.
    """
    trial = _Trial(Subject(*subject), Network(**shapes), torch.device(device), rounds)
    float32 = trial.subject.precision in ("float32", "tf32")
    with float32_products(tf32=trial.subject.precision == "tf32") if float32 else nullcontext():
        return asdict(trial.verdict())


class _Trial:
    def __init__(self, subject: Subject, network: Network, device: torch.device, rounds: int) -> None:
        self.subject, self.network, self.device, self.rounds = subject, network, device, rounds
        self.operation = OPERATIONS[subject.operation]
        self.backend = self.operation.api.BACKENDS[subject.backend]
        self.training = subject.mode == "training"

    def verdict(self) -> Verdict:
        size = self.network.patches if self.training else self.network.image
        tensors = self._tensors(size, LAYOUTS["NCHW"])
        questions = self.operation.questions(self.operation.arguments(self.network, tensors))
        reasons = self.backend.unsupported_reasons(*questions)
        if reasons:
            return Verdict(failure=f"it cannot run here: {'; '.join(reasons)}")
        compared = self._compare()
        if compared.failure:
            return compared
        other = self.operation.otherwise(questions)
        modules = (self.backend, self.operation.api.BACKENDS[other])
        milliseconds = {name: self._times(modules, self._tensors(size, layout)) for name, layout in LAYOUTS.items()}
        return replace(compared, other=other, milliseconds=milliseconds)

    def _tensors(self, size: Size, layout: torch.memory_format) -> list[Tensor]:
        where = Where(self.device, PRECISIONS[self.subject.precision], layout)
        return self.operation.tensors(self.network, size, where)

    def _run(self, backend: ModuleType, tensors: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor]:
        def compute(*leaves: Tensor) -> Tensor:
            out: Tensor = backend.forward(*self.operation.arguments(self.network, leaves))
            return out

        kind = PRECISIONS[self.subject.precision]
        return results(compute, tensors, gradients=self.training, weights=weights, kind=kind)

    def _compare(self) -> Verdict:
        """Against the reference in float64, and against itself, in every layout; without times."""
        nearest, verdict = -1.0, Verdict(failure="nothing was compared")
        # On the CPU, which has the memory for it, and shares no fault with the GPU
        numbers = [tensor.double().cpu() for tensor in self._tensors(self.network.small, LAYOUTS["NCHW"])]
        exact = self._run(self.operation.reference, numbers)
        for layout in LAYOUTS.values():
            tensors = self._tensors(self.network.small, layout)
            plain = self._run(self.operation.reference, tensors)
            found, again = (self._run(self.backend, tensors) for _ in range(2))
            for number in range(len(exact)):
                share, compared = self._errors(number, exact[number], plain[number], found[number])
                if compared.failure:
                    return compared
                if not torch.equal(found[number], again[number]):
                    return replace(compared, failure=f"{compared.part} differs from one run to the next")
                if share > nearest:
                    nearest, verdict = share, compared
        return verdict

    def _errors(self, number: int, exact: Tensor, plain: Tensor, found: Tensor) -> tuple[float, Verdict]:
        """The part of the allowed error that there is, and what to say of it."""
        part = self.operation.parts[number]
        if found.dtype != plain.dtype:
            return math.inf, Verdict(failure=f"{part} is {found.dtype}, not {plain.dtype}", part=part)
        exact, plain, found = (self.operation.matter(number, x) for x in (exact, plain, found))
        plain_error, error = (largest_difference(x, exact) for x in (plain, found))
        if not math.isfinite(error):
            return math.inf, Verdict(failure=f"{part} is not finite", part=part)
        eps = TF32_EPS if self.subject.precision == "tf32" else torch.finfo(PRECISIONS[self.subject.precision]).eps
        allowed = allowed_error(exact, plain_error, eps, roundings=self.operation.roundings)
        wrong = f"{part} is off by {error:.1e}, plain PyTorch by {plain_error:.1e}"
        return error / allowed, Verdict(wrong if error > allowed else "", part, error, plain_error)

    def _times(self, modules: Sequence[ModuleType], tensors: Sequence[Tensor]) -> tuple[float, ...]:
        """Medians of milliseconds, of backends that are timed side by side once they have compiled and chosen."""
        weights = torch.ones_like(self._run(modules[0], tensors)[0]) if self.training else None
        calls = [lambda module=module: self._run(module, tensors, weights) for module in modules]
        for call in calls:
            call()
        counts = [max(1, round(LEAST_ROUND / self._seconds(call, 1))) for call in calls]
        seconds: list[list[float]] = [[] for _ in calls]
        for _ in range(self.rounds):
            for call, count, times in zip(calls, counts, seconds, strict=True):
                times.append(self._seconds(call, count))
        return tuple(statistics.median(times) * 1000 for times in seconds)

    def _seconds(self, call: Callable[[], Any], count: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._wait()
        return (time.perf_counter() - start) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
