"""Each backend of each operation compared with the reference in float64, on small inputs; in the child process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.autotune.trial import largest_difference, results
from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.operation import Explanation, SampleShapes

from .report import Finding

__all__ = ["CASES", "TOLERANCES", "compare", "dispatch", "examine"]

#: The largest difference from the reference, relative to the reference's largest number: some ten roundings.
TOLERANCES = {"float32": 2e-5, "bfloat16": 5e-2}
_SIZE, _SHAPES = (2, 21, 18), SampleShapes(channels=32, heads=2, window=8, pdim=16, hidden=40)
#: What is tested: operations with the shapes that they are computed with; attention with both kinds of bias.
CASES = {name: (operation, _SHAPES) for name, operation in OPERATIONS.items()}
CASES["window attention, factors"] = (OPERATIONS["window attention"], replace(_SHAPES, rank=8))


def dispatch(device: str) -> list[tuple[tuple[str, str, str], dict[str, str | None], list[str]]]:
    """For each case and type of numbers: what auto takes in inference and in training, and all backends."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    lines = []
    for dtype in TOLERANCES if device == "cuda" else ["float32"]:
        for name, (operation, _) in CASES.items():
            auto = {mode: found.chosen for mode, found in _explain(name, device, dtype).items()}
            lines.append(((name, device, dtype), auto, list(operation.backends)))
    return lines


def examine(key: str, backend: str, target: tuple[str, str, str], test: bool, bad: str, advice: str) -> list[Finding]:
    """Can a backend run, and with `test`, are its results right? A wrong one has the status `bad`, and `advice`."""
    explanations = _explain(*target)
    reasons, in_training = (found.reasons[backend] for found in explanations.values())
    if reasons:
        return [Finding(key, f"cannot run: {'; '.join(reasons)}")]
    skipped = {f" in {mode}": found.auto_skip_reasons.get(backend, []) for mode, found in explanations.items()}
    if skipped[" in inference"] == skipped[" in training"]:
        skipped = {"": skipped[" in inference"]}
    left = "".join(f"; auto does not take it{mode}: {'; '.join(why)}" for mode, why in skipped.items() if why)
    if not test:
        return [Finding(key, f"can run{left}")]
    start = time.perf_counter()
    errors = compare(*target, backend, gradients=not in_training)
    seconds, tolerance = time.perf_counter() - start, TOLERANCES[target[2]]
    data = {name: f"{error:.1e}" for name, error in errors.items()}  # text: JSON has no infinity
    told = ", ".join(f"{name} {error}" for name, error in data.items())
    told += f", no gradients: {'; '.join(in_training)}" if in_training else ""
    text = f"self-test: error {told} (at most {tolerance:.0e}), {seconds:.2f} s{left}"
    if max(errors.values()) > tolerance:
        return [Finding(key, f"WRONG, {text}", bad, advice, data)]
    return [Finding(key, text, data=data)]


def _explain(case: str, device: str, dtype: str) -> dict[str, Explanation]:
    """What can compute it, in inference and in training."""
    operation, shapes = CASES[case]
    found = {}
    for mode in ("inference", "training"):
        with torch.set_grad_enabled(mode == "training"):
            tensors = operation.sample(shapes, _SIZE, device=device, dtype=getattr(torch, dtype))
            tensors = [tensor.requires_grad_(mode == "training") for tensor in tensors]
            found[mode] = operation.explain(*operation.arguments(shapes, tensors))
    return found


def compare(case: str, device: str, dtype: str, backend: str, *, gradients: bool) -> dict[str, float]:
    """The largest differences from the reference, relative to its largest number: `forward`, and maybe `gradients`."""
    torch.backends.cudnn.allow_tf32 = False
    (operation, shapes), kind = CASES[case], getattr(torch, dtype)
    tensors = operation.sample(shapes, _SIZE, device=device, dtype=kind)

    def run(module: ModuleType, tensors: Sequence[Tensor]) -> list[Tensor]:
        def forward(*leaves: Tensor) -> Any:
            return module.forward(*operation.arguments(shapes, leaves))

        found = results(forward, tensors, gradients=gradients, kind=kind)
        return [operation.canonicalise(number, tensor) for number, tensor in enumerate(found)]

    exact = run(operation.reference, [tensor.double().cpu() for tensor in tensors])
    found = run(operation.backends[backend], tensors)
    errors = [largest_difference(a, b) / b.abs().max().item() for a, b in zip(found, exact, strict=True)]
    return {"forward": errors[0]} | ({"gradients": max(errors[1:])} if gradients else {})
