"""Each backend of each operation against the reference in float64, on small inputs; in the child process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops import dispatch
from esc_arch.ops.autotune.comparison import largest_difference, results
from esc_arch.ops.operation import Operation, Shapes
from esc_arch.ops.window_attention import WINDOW_ATTENTION

__all__ = ["OPERATIONS", "TOLERANCES", "compare", "examine"]

#: The largest difference from the reference allowed, in parts of the reference's largest number: some ten roundings
#: of the type.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}

_BATCH, _HEIGHT, _WIDTH = 2, 21, 18
_CHANNELS, _PARTIAL, _HIDDEN = 32, 16, 40
_WINDOW, _HEADS, _RANK = 8, 2, 8
_EPS = 1e-6


#: Small, to be quick.
_SHAPES, _SIZE = Shapes(channels=32, heads=2, window=8, pdim=16, hidden=40), (2, 21, 18)
#: The operations, with the shapes that they are computed with; attention with both kinds of bias.
OPERATIONS = {name: (operation, _SHAPES) for name, operation in dispatch.OPERATIONS.items()}
OPERATIONS["window attention, factors"] = (WINDOW_ATTENTION, replace(_SHAPES, rank=8))


def examine(operation: str, device: str, dtype: str) -> dict[str, Any]:
    """Which backends can run, why the others cannot, which one auto takes, and why it leaves some that can run.

    Returns:
        `auto` and `left_by_auto` for inference and training; `reasons` and `reasons_in_training` for all backends.
    """
    (described, shapes), kind = OPERATIONS[operation], getattr(torch, dtype)
    surveys = {}
    for name, training in (("inference", False), ("training", True)):
        with torch.set_grad_enabled(training):
            tensors = described.sample(shapes, _SIZE, device=device, dtype=kind)
            tensors = [tensor.requires_grad_(training) for tensor in tensors]
            surveys[name] = described.explain(*described.arguments(shapes, tensors))
    return {
        "auto": {name: found.chosen for name, found in surveys.items()},
        "reasons": surveys["inference"].reasons,
        "reasons_in_training": surveys["training"].reasons,
        "left_by_auto": {name: found.auto_skip_reasons for name, found in surveys.items()},
    }


def compare(operation: str, backend: str, device: str, dtype: str, gradients: bool) -> dict[str, Any]:
    """How far a backend is from the reference.

    Args:
        operation: a key of `OPERATIONS`.
        backend: one that has no reasons against it.
        gradients: compare them as well.

    Returns:
        The largest differences, `forward` and, if asked for, `gradients`, in parts of the largest number of what is
        compared; the `tolerance`; and the `seconds` of the backend's calls.
    """
    (described, shapes), kind = OPERATIONS[operation], getattr(torch, dtype)
    torch.backends.cudnn.allow_tf32 = False
    tensors = described.sample(shapes, _SIZE, device=device, dtype=kind)
    exact = [tensor.double().cpu() for tensor in tensors]
    expected = _compute(described, shapes, described.reference, exact, kind, gradients)
    start = time.perf_counter()
    found = _compute(described, shapes, described.backends[backend], tensors, kind, gradients)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    errors = [
        _error(*(described.canonicalise(number, part) for part in pair))
        for number, pair in enumerate(zip(found, expected, strict=True))
    ]
    result = {"forward": errors[0], "tolerance": TOLERANCES[kind], "seconds": seconds}
    return result | ({"gradients": max(errors[1:])} if gradients else {})


def _compute(
    operation: Operation,
    shapes: Shapes,
    backend: ModuleType,
    tensors: Sequence[Tensor],
    kind: torch.dtype,
    gradients: bool,
) -> list[Tensor]:
    """The result, and the gradients of its sum with fixed weights that are numbers of `kind`."""
    return results(
        lambda *leaves: backend.forward(*operation.arguments(shapes, leaves)), tensors, gradients=gradients, kind=kind
    )


def _error(found: Tensor, expected: Tensor) -> float:
    return largest_difference(found, expected) / expected.detach().abs().max().item()
