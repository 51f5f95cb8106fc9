"""Each backend of each operation compared with the reference in float64, on small inputs; in the child process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.autotune.comparison import largest_difference, results
from esc_arch.ops.autotune.networks import Network, Size
from esc_arch.ops.autotune.operations import OPERATIONS as TRIED
from esc_arch.ops.autotune.operations import Operation, Where
from esc_arch.ops.backends import Survey, explain_dispatch
from esc_arch.ops.conv3x3 import api as conv3x3
from esc_arch.ops.conv_ffn import api as conv_ffn
from esc_arch.ops.layer_norm import api as layer_norm
from esc_arch.ops.window_attention import api as window_attention

from .report import Finding

__all__ = ["OPERATIONS", "TOLERANCES", "compare", "dispatch", "examine"]

#: The largest difference from the reference, relative to the reference's largest number: some ten roundings.
TOLERANCES = {"float32": 2e-5, "bfloat16": 5e-2}
_SIZE = (2, 21, 18)
_NETWORK = Network(32, heads=2, window=8, pdim=16, kernel_size=13, small=_SIZE, image=_SIZE, patches=_SIZE)
_EPS = 1e-6


def _operation(api: ModuleType, channels: int, *shapes: tuple[int, ...]) -> Operation:
    """One whose arguments are a map with so many channels, and parameters of these shapes."""

    def tensors(network: Network, size: Size, where: Where) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size[0], channels, *size[1:], generator=generator)
        parameters = (torch.randn(shape, generator=generator) for shape in shapes)
        return [where.put(x), *(parameter.to(where.device, where.dtype) for parameter in parameters)]

    return Operation(api, (), 0, tensors, arguments=lambda _, given: tuple(given), questions=tuple)


#: Those that autotune tries, and the others that have several backends.
OPERATIONS = {
    "window attention": TRIED["window attention"],
    "window attention, factors": replace(
        _operation(window_attention, 96, (2, 64, 8), (2, 64, 8)),
        arguments=lambda network, given: (given[0], tuple(given[1:]), network.window, network.heads),
    ),
    "ConvAttn": TRIED["ConvAttn"],
    "ConvFFN": _operation(conv_ffn, 32, (40, 32, 1, 1), (40,), (40, 1, 3, 3), (40,), (32, 40, 1, 1), (32,)),
    "LayerNorm": replace(
        _operation(layer_norm, 32, (32,), (32,)),
        arguments=lambda _, given: (*given, _EPS),
        questions=lambda arguments: arguments[:-1],
    ),
    "3x3 convolution": _operation(conv3x3, 32, (32, 32, 3, 3), (32,)),
}


def dispatch(device: str) -> list[tuple[tuple[str, str, str], dict[str, str | None], list[str]]]:
    """For each operation and type of numbers: what auto takes in inference and in training, and all backends."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    found = []
    for dtype in TOLERANCES if device == "cuda" else ["float32"]:
        for name, operation in OPERATIONS.items():
            surveys = _surveys(name, device, dtype)
            auto = {mode: survey.chosen for mode, survey in surveys.items()}
            found.append(((name, device, dtype), auto, list(operation.api.BACKENDS)))
    return found


def examine(key: str, backend: str, target: tuple[str, str, str], test: bool, bad: str, advice: str) -> list[Finding]:
    """Whether a backend can run, and if asked for, whether its results are right: otherwise `bad`, with `advice`."""
    surveys = _surveys(*target)
    reasons, in_training = (survey.reasons[backend] for survey in surveys.values())
    if reasons:
        return [Finding(key, f"cannot run: {'; '.join(reasons)}")]
    skipped = {f" in {mode}": survey.auto_skip_reasons.get(backend, []) for mode, survey in surveys.items()}
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


def _surveys(operation: str, device: str, dtype: str) -> dict[str, Survey]:
    """Of all backends, in inference and in training."""
    described, surveys = OPERATIONS[operation], {}
    for mode in ("inference", "training"):
        with torch.set_grad_enabled(mode == "training"):
            tensors = [tensor.requires_grad_(mode == "training") for tensor in _tensors(described, device, dtype)]
            questions = described.questions(described.arguments(_NETWORK, tensors))
            surveys[mode] = explain_dispatch(described.api.BACKENDS, described.api.AUTO_ORDER, *questions)
    return surveys


def _tensors(operation: Operation, device: str, dtype: str) -> list[Tensor]:
    where = Where(torch.device(device), getattr(torch, dtype), torch.channels_last)
    return operation.tensors(_NETWORK, _SIZE, where)


def compare(operation: str, device: str, dtype: str, backend: str, *, gradients: bool) -> dict[str, float]:
    """The largest differences from the reference, relative to its largest number: `forward`, and maybe `gradients`."""
    torch.backends.cudnn.allow_tf32 = False
    described, kind = OPERATIONS[operation], getattr(torch, dtype)
    tensors = _tensors(described, device, dtype)

    def run(module: ModuleType, tensors: Sequence[Tensor]) -> list[Tensor]:
        def forward(*leaves: Tensor) -> Any:
            return module.forward(*described.arguments(_NETWORK, leaves))

        found = results(forward, tensors, gradients=gradients, kind=kind)
        return [described.matter(number, tensor) for number, tensor in enumerate(found)]

    exact = run(described.reference, [tensor.double().cpu() for tensor in tensors])
    found = run(described.api.BACKENDS[backend], tensors)
    errors = [largest_difference(a, b) / b.abs().max().item() for a, b in zip(found, exact, strict=True)]
    return {"forward": errors[0]} | ({"gradients": max(errors[1:])} if gradients else {})
