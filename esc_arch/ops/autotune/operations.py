"""The operations that are tried, with random numbers of a network's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.conv_attn import api as conv_attn_api
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.ops.window_attention import api as window_attention_api

from .networks import NETWORKS, Network, Size
from .verdicts import MODES, PRECISIONS, Subject

__all__ = ["LAYOUTS", "OPERATIONS", "Operation", "Where", "subjects"]

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Where:
    """How a map lies in memory, and on which device."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format

    def put(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=self.layout)


@dataclass(frozen=True)
class Operation:
    """What is tried.

    Attributes:
        api: its module with `BACKENDS`, the reference first, and `AUTO_ORDER`.
        parts: the result and the gradients, for messages.
        roundings: see `allowed_error`.
        tensors: makes random ones of a network's shapes, for a map of a size; see `Where`.
        arguments: makes those of `forward` of these tensors.
        questions: makes those of `unsupported_reasons` of the arguments.
        matter: what of a gradient counts, by its number.
    """

    api: ModuleType
    parts: tuple[str, ...]
    roundings: int
    tensors: Callable[[Network, Size, Where], list[Tensor]]
    arguments: Callable[[Network, Sequence[Tensor]], tuple[Any, ...]]
    questions: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    matter: Callable[[int, Tensor], Tensor] = lambda number, gradient: gradient

    @property
    def reference(self) -> ModuleType:
        reference: ModuleType = next(iter(self.api.BACKENDS.values()))
        return reference

    def tried(self) -> Iterator[str]:
        """The backends that auto takes after a trial alone."""
        return (name for name, module in self.api.BACKENDS.items() if hasattr(module, "auto_skip_reasons"))

    def otherwise(self, questions: tuple[Any, ...]) -> str:
        """What auto takes without them."""
        tried = set(self.tried())
        order = (name for name in self.api.AUTO_ORDER if name not in tried)
        return next(name for name in order if not self.api.BACKENDS[name].unsupported_reasons(*questions))


def _attention_tensors(network: Network, size: Size, where: Where) -> list[Tensor]:
    """The projection, and a table with which the weights are neither flat nor all on one token; it is a parameter."""
    batch, height, width = size
    qkv, table = _normal((batch, 3 * network.channels, height, width), (network.heads, (2 * network.window - 1) ** 2))
    return [where.put(qkv), 2 * table.to(where.device)]


def _conv_attn_tensors(network: Network, size: Size, where: Where) -> list[Tensor]:
    """The first channels of a wider map, a symmetric large kernel, and the dynamic one."""
    batch, height, width = size
    pdim, side = network.pdim, network.kernel_size
    shapes = ((batch, network.channels, height, width), (pdim, pdim, side, side), (batch, pdim, 3, 3))
    wide, large, dynamic = _normal(*shapes)
    kernels = (x.to(where.device, where.dtype) for x in (symmetrise(large), dynamic))
    return [where.put(wide)[:, :pdim], *kernels]


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    """The same random numbers each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


OPERATIONS = {
    "window attention": Operation(
        window_attention_api,
        ("the result", "the gradient of the projection", "the gradient of the biases"),
        4,
        _attention_tensors,
        lambda network, tensors: (*tensors, network.window, network.heads),
        lambda arguments: arguments,
    ),
    "ConvAttn": Operation(
        conv_attn_api,
        ("the result", "the gradient of the map", "the gradient of the large kernel", "that of the dynamic kernel"),
        1,
        _conv_attn_tensors,
        lambda network, tensors: tuple(tensors),
        lambda arguments: (*arguments, True),
        # Backends may give the symmetric part of the large kernel's alone, which is all that networks use
        lambda number, gradient: symmetrise(gradient.double()) if number == 2 else gradient,
    ),
}


def subjects(
    networks: Sequence[str] = tuple(NETWORKS), precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Subject]:
    """All there is to try; what differs in the mode alone follows each other."""
    for operation, described in OPERATIONS.items():
        for backend in described.tried():
            for network in networks:
                for precision in precisions:
                    for mode in MODES:
                        yield Subject(operation, backend, network, precision, mode)
