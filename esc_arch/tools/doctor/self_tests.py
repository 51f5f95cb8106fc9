"""Each backend of each operation against the reference in float64, on small inputs; in the child process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.autotune.comparison import largest_difference, results
from esc_arch.ops.backends import Survey, explain_dispatch
from esc_arch.ops.conv3x3 import api as conv3x3_api
from esc_arch.ops.conv_attn import api as conv_attn_api
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.ops.conv_ffn import api as conv_ffn_api
from esc_arch.ops.layer_norm import api as layer_norm_api
from esc_arch.ops.window_attention import api as window_attention_api

__all__ = ["OPERATIONS", "TOLERANCES", "compare", "examine"]

#: The largest difference from the reference allowed, in parts of the reference's largest number: some ten roundings
#: of the type.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}

_BATCH, _HEIGHT, _WIDTH = 2, 21, 18
_CHANNELS, _PARTIAL, _HIDDEN = 32, 16, 40
_WINDOW, _HEADS, _RANK = 8, 2, 8
_EPS = 1e-6


@dataclass(frozen=True)
class Operation:
    """What is computed by several backends.

    Attributes:
        api: its module with `BACKENDS`, the reference first, and `AUTO_ORDER`.
        shapes: of the tensors it is computed from.
        prepare: makes the arguments from these tensors.
        questions: makes those of `unsupported_reasons` from the arguments.
    """

    api: ModuleType
    shapes: tuple[tuple[int, ...], ...]
    prepare: Callable[..., Sequence[Any]]
    questions: Callable[[Sequence[Any]], Sequence[Any]] = tuple

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """The same random numbers each time; maps have their channels innermost."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in self.shapes]
        return [made[0].contiguous(memory_format=torch.channels_last), *made[1:]]


def _attention(qkv: Tensor, *bias: Tensor) -> Sequence[Any]:
    return qkv, bias if len(bias) > 1 else bias[0], _WINDOW, _HEADS


_MAP = (_BATCH, _CHANNELS, _HEIGHT, _WIDTH)
_PROJECTION = (_BATCH, 3 * _CHANNELS, _HEIGHT, _WIDTH)
_FACTORS = (_HEADS, _WINDOW**2, _RANK)

OPERATIONS = {
    "window attention": Operation(
        window_attention_api, (_PROJECTION, (_HEADS, (2 * _WINDOW - 1) ** 2)), _attention
    ),
    "window attention, factors": Operation(window_attention_api, (_PROJECTION, _FACTORS, _FACTORS), _attention),
    "ConvAttn": Operation(
        conv_attn_api,
        ((_BATCH, _PARTIAL, _HEIGHT, _WIDTH), (_PARTIAL, _PARTIAL, 13, 13), (_BATCH, _PARTIAL, 3, 3)),
        lambda x, large, dynamic: (x, symmetrise(large), dynamic),
        lambda arguments: (*arguments, True),
    ),
    "ConvFFN": Operation(
        conv_ffn_api,
        (
            _MAP,
            (_HIDDEN, _CHANNELS, 1, 1),
            (_HIDDEN,),
            (_HIDDEN, 1, 3, 3),
            (_HIDDEN,),
            (_CHANNELS, _HIDDEN, 1, 1),
            (_CHANNELS,),
        ),
        lambda *tensors: tensors,
    ),
    "LayerNorm": Operation(
        layer_norm_api,
        (_MAP, (_CHANNELS,), (_CHANNELS,)),
        lambda *tensors: (*tensors, _EPS),
        lambda arguments: arguments[:-1],
    ),
    "3x3 convolution": Operation(
        conv3x3_api, (_MAP, (_CHANNELS, _CHANNELS, 3, 3), (_CHANNELS,)), lambda *tensors: tensors
    ),
}  # fmt: skip


def examine(operation: str, device: str, dtype: str) -> dict[str, Any]:
    """Which backends can run, why the others cannot, which one auto takes, and why it leaves some that can run.

    Returns:
        `auto` and `left_by_auto` for inference and training; `reasons` and `reasons_in_training` for all backends.
    """
    described, kind = OPERATIONS[operation], getattr(torch, dtype)
    surveys = {}
    for name, training in (("inference", False), ("training", True)):
        with torch.set_grad_enabled(training):
            tensors = [tensor.requires_grad_(training) for tensor in described.tensors(device, kind)]
            surveys[name] = _survey(described, tensors)
    return {
        "auto": {name: found.chosen for name, found in surveys.items()},
        "reasons": surveys["inference"].reasons,
        "reasons_in_training": surveys["training"].reasons,
        "left_by_auto": {name: found.auto_skip_reasons for name, found in surveys.items()},
    }


def _survey(operation: Operation, tensors: Sequence[Tensor]) -> Survey:
    questions = operation.questions(operation.prepare(*tensors))
    return explain_dispatch(operation.api.BACKENDS, operation.api.AUTO_ORDER, *questions)


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
    described, kind = OPERATIONS[operation], getattr(torch, dtype)
    torch.backends.cudnn.allow_tf32 = False
    tensors = described.tensors(device, kind)
    reference = next(iter(described.api.BACKENDS.values()))
    exact = [tensor.double().cpu() for tensor in tensors]
    expected = _compute(described, reference, exact, kind, gradients)
    start = time.perf_counter()
    found = _compute(described, described.api.BACKENDS[backend], tensors, kind, gradients)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
    result = {"forward": errors[0], "tolerance": TOLERANCES[kind], "seconds": seconds}
    return result | ({"gradients": max(errors[1:])} if gradients else {})


def _compute(
    operation: Operation, backend: ModuleType, tensors: Sequence[Tensor], kind: torch.dtype, gradients: bool
) -> list[Tensor]:
    """The result, and the gradients of its sum with fixed weights that are numbers of `kind`."""
    return results(
        lambda *leaves: backend.forward(*operation.prepare(*leaves)), tensors, gradients=gradients, kind=kind
    )


def _error(found: Tensor, expected: Tensor) -> float:
    return largest_difference(found, expected) / expected.detach().abs().max().item()
