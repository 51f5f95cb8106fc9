"""Try a backend: is it exact, the same each time, and faster than what auto would take otherwise?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.float32 import float32_products
from esc_arch.ops.operation import Operation, Size

from .results import MODES, NETWORKS, PRECISIONS, Case, Network, TrialResult

__all__ = ["LAYOUTS", "ROUNDS", "allowed_error", "cases", "largest_difference", "results", "run"]

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

#: Of TF32's ten bits.
TF32_EPS = 2.0**-10
#: Roundings by which float32 sums over all pixels of a map differ with their order.
SUM_ROUNDINGS = 8
#: Rounds of each backend, in turns, and the least seconds that the calls of a round last together.
ROUNDS, LEAST_ROUND = 9, 0.02


def cases() -> Iterator[Case]:
    """All there is to try; cases that differ only in the mode follow each other."""
    for name, operation in OPERATIONS.items():
        for backend, network, precision, mode in product(autotuned(operation), NETWORKS, PRECISIONS, MODES):
            yield Case(name, backend, network, precision, mode)


def autotuned(operation: Operation) -> list[str]:
    """The backends that auto takes only where they were found exact and faster."""
    return [name for name, module in operation.backends.items() if hasattr(module, "auto_skip_reasons")]


def run(case: Case, network: Network, device: torch.device, rounds: int) -> TrialResult:
    """Try a backend with the shapes of a network, timed in several rounds."""
    with float32_products(tf32=case.precision == "tf32"):  # of no effect on the half types
        return _Trial(case, network, device, rounds).result()


class _Trial:
    def __init__(self, case: Case, network: Network, device: torch.device, rounds: int) -> None:
        self.case, self.network, self.device, self.rounds = case, network, device, rounds
        self.operation = OPERATIONS[case.operation]
        self.backend = self.operation.backends[case.backend]
        self.training = case.mode == "training"
        self.dtype = PRECISIONS[case.precision]

    def result(self) -> TrialResult:
        size = self.network.patches if self.training else self.network.image
        tensors = self._tensors(size, LAYOUTS["NCHW"])
        arguments = self.operation.arguments(self.network, tensors)
        unsupported = self.operation.explain(*arguments).reasons
        if reasons := unsupported[self.case.backend]:
            return TrialResult(failure=f"it cannot run here: {'; '.join(reasons)}")
        compared = self._compare()
        if compared.failure:
            return compared
        others = (name for name in self.operation.order if name not in autotuned(self.operation))
        baseline = next(name for name in others if not unsupported[name])
        modules = (self.backend, self.operation.backends[baseline])
        milliseconds = {name: self._times(modules, self._tensors(size, layout)) for name, layout in LAYOUTS.items()}
        return replace(compared, baseline=baseline, milliseconds=milliseconds)

    def _tensors(self, size: Size, layout: torch.memory_format) -> list[Tensor]:
        return self.operation.sample(self.network, size, device=self.device, dtype=self.dtype, layout=layout)

    def _run(self, backend: ModuleType, tensors: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor]:
        def compute(*leaves: Tensor) -> Tensor:
            return backend.forward(*self.operation.arguments(self.network, leaves))

        return results(compute, tensors, gradients=self.training, weights=weights, kind=self.dtype)

    def _compare(self) -> TrialResult:
        """Against the reference in float64, and against itself, in every layout; without times."""
        # On the CPU, which has the memory for it, and shares no fault with the GPU
        numbers = [tensor.double().cpu() for tensor in self._tensors(self.network.small, LAYOUTS["NCHW"])]
        exact = self._run(self.operation.reference, numbers)
        compared = []
        for layout in LAYOUTS.values():
            tensors = self._tensors(self.network.small, layout)
            plain = self._run(self.operation.reference, tensors)
            found, again = (self._run(self.backend, tensors) for _ in range(2))
            for number in range(len(exact)):
                share, result = self._errors(number, exact[number], plain[number], found[number])
                if not result.failure and not torch.equal(found[number], again[number]):
                    result = TrialResult(failure=f"{result.part} differs from one run to the next")
                if result.failure:
                    return result
                compared.append((share, result))
        return max(compared, key=lambda pair: pair[0])[1]

    def _errors(self, number: int, exact: Tensor, plain: Tensor, found: Tensor) -> tuple[float, TrialResult]:
        """The share of the allowed error that is used, and what to say of it."""
        part = self.operation.parts[number]
        if found.dtype != plain.dtype:
            return math.inf, TrialResult(failure=f"{part} is {found.dtype}, not {plain.dtype}")
        exact, plain, found = (self.operation.canonicalise(number, x) for x in (exact, plain, found))
        plain_error, error = (largest_difference(x, exact) for x in (plain, found))
        if not math.isfinite(error):
            return math.inf, TrialResult(failure=f"{part} is not finite")
        eps = TF32_EPS if self.case.precision == "tf32" else torch.finfo(self.dtype).eps
        allowed = allowed_error(exact, plain_error, eps, roundings=self.operation.roundings)
        wrong = f"{part} is off by {error:.1e}, plain PyTorch by {plain_error:.1e}"
        return error / allowed, TrialResult(wrong if error > allowed else "", part, error, plain_error)

    def _times(self, modules: Sequence[ModuleType], tensors: Sequence[Tensor]) -> tuple[float, ...]:
        """Medians of milliseconds, of backends that are timed in turns once they have compiled and chosen."""
        weights = torch.ones_like(self._run(modules[0], tensors)[0]) if self.training else None
        calls = [partial(self._run, module, tensors, weights) for module in modules]
        timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
        with torch.cuda.device_of(tensors[0]):  # which timers wait for
            for timer in timers:
                timer.timeit(1)
            rounds = [
                [timer.blocked_autorange(min_run_time=LEAST_ROUND) for timer in timers] for _ in range(self.rounds)
            ]
        return tuple(statistics.median(each.median for each in times) * 1000 for times in zip(*rounds, strict=True))


def results(
    compute: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *,
    gradients: bool = True,
    weights: Tensor | None = None,
    kind: torch.dtype | None = None,
) -> list[Tensor]:
    """What is computed of `tensors`, and the gradients of its sum with fixed weights.

    Args:
        compute: of as many tensors as there are, one in the type and layout that is wanted.
        gradients: otherwise without them, and nothing is kept for them.
        weights: in the shape of what is computed; the same random ones each time where there are none.
        kind: the type whose numbers these random ones are; that of what is computed where there is none.
    """
    leaves = [tensor.detach().requires_grad_(gradients) for tensor in tensors]
    with torch.set_grad_enabled(gradients):
        out = compute(*leaves)
    if not gradients:
        return [out]
    if weights is None:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind or out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.device, out.dtype))]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite when a number is not finite, so that NaN never passes."""
    error = (found.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    return error if math.isfinite(error) else math.inf


def allowed_error(expected: Tensor, plain_error: float, eps: float, *, roundings: int, factor: int = 2) -> float:
    """How far a backend may be from the exact result: twice as far as plain PyTorch, and some roundings.

    Args:
        expected: the exact result.
        plain_error: how far the readable reference is from it, computing in the same precision.
        eps: of the precision, see `torch.finfo`.
        roundings: of the largest number, or of 1: where all pixels are equal, gradients are differences that
            are exactly 0, and plain PyTorch may hit them. Those of sums in float32 are added.
        factor: in place of twice.
    """
    largest = max(1.0, expected.abs().max().item())
    return factor * plain_error + (roundings * eps + SUM_ROUNDINGS * torch.finfo(torch.float32).eps) * largest
