"""An operation that several backends compute, and the choice among them; `dispatch` has the table of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.ops import cpu

__all__ = [
    "Explanation",
    "Operation",
    "SampleShapes",
    "UnusableBackend",
    "check_norm",
    "check_shapes",
    "normal",
    "wants_gradients",
]

#: Other spellings of backends.
ALIASES = {"cpp": "cpu"}

#: Batch, height and width of a map.
Size = tuple[int, int, int]


class UnusableBackend(UserError, RuntimeError):
    """The backend requested by name cannot take the inputs, or none can; the message lists every reason."""


class Explanation(NamedTuple):
    """What can compute an operation of given inputs.

    Attributes:
        chosen: the backend that auto takes; None where none can.
        reasons: why each cannot, by name; empty lists for those that can.
        auto_skip_reasons: why auto does not take those that can, by name; without those that it may take.
    """

    chosen: str | None
    reasons: dict[str, list[str]]
    auto_skip_reasons: dict[str, list[str]]


@dataclass(frozen=True)
class SampleShapes:
    """Sizes that a network computes with: attention's, ConvAttn's and ConvFFN's; rank 0 stands for a bias table."""

    channels: int = 64
    heads: int = 4
    window: int = 32
    pdim: int = 16
    kernel_size: int = 13
    hidden: int = 80
    rank: int = 0


@dataclass(eq=False)
class Operation:
    """An operation with its backends, and sample inputs to try them on.

    Attributes:
        name: for messages.
        option: what the user sets to a backend's name.
        backends: by name, the readable reference first: modules with `forward` and maybe, of the same arguments,
            `unsupported_reasons` and `auto_skip_reasons`: why auto skips a usable backend. Both are empty without.
        order: what auto tries; the first one without any reasons is taken.
        inputs: random float32 tensors of a network's shapes, for a map of a size; the map first.
        parts: the result and the gradients of the tensors, for messages.
        arguments: those of `forward`, of such tensors.
        parameters_stay_float32: in half precision, all tensors but the map do.
        roundings: of the largest number that a result may be off, on top of twice plain PyTorch's error.
        canonicalise: what of a gradient counts, by the number of its tensor.
    """

    name: str
    option: str
    backends: dict[str, ModuleType]
    order: tuple[str, ...]
    inputs: Callable[[SampleShapes, Size], list[Tensor]]
    parts: tuple[str, ...]
    arguments: Callable[[SampleShapes, Sequence[Tensor]], tuple[Any, ...]] = lambda shapes, tensors: tuple(tensors)
    parameters_stay_float32: bool = False
    roundings: int = 4
    canonicalise: Callable[[int, Tensor], Tensor] = lambda number, gradient: gradient

    def __call__(self, backend: str, *inputs: Any) -> Tensor:
        """`forward` of the backend that is chosen; see `choose`."""
        return self.choose(backend, *inputs).forward(*inputs)

    @property
    def reference(self) -> ModuleType:
        return next(iter(self.backends.values()))

    def resolve(self, backend: str) -> str:
        """The backend that a spelling means; case does not matter.

        Raises:
            ValueError: there is no such backend; the message lists those there are.
        """
        name = str(backend).lower()
        name = ALIASES.get(name, name)
        if name != "auto" and name not in self.backends:
            raise ValueError(
                f"{self.option} {backend!r} is not known; allowed: auto, {', '.join(self.backends)} (in any case)."
            )
        return name

    def choose(self, backend: str, *inputs: Any) -> ModuleType:
        """The backend to compute with.

        Args:
            backend: a name, or auto. The C++ operators are built when requested by name.
            inputs: the arguments of `forward`.

        Raises:
            ValueError: there is no such backend.
            UnusableBackend: the backend requested by name cannot take these inputs.
        """
        wanted = self.resolve(backend)
        if wanted == "cpu":
            cpu.build_by_name()
        refusals = {}
        for name in self.order if wanted == "auto" else (wanted,):
            reasons = self.unsupported_reasons(name, *inputs)
            if not reasons and wanted == "auto":
                reasons = self._ask(name, "auto_skip_reasons", inputs)
            if not reasons:
                return self.backends[name]
            refusals[name] = "; ".join(reasons)
        details = ". ".join(f"{name}: {reasons}" for name, reasons in refusals.items())
        raise UnusableBackend(
            f"{self.option} {wanted} cannot run here. {details}. Use {self.option}: auto to have one chosen."
        )

    def unsupported_reasons(self, name: str, *inputs: Any) -> list[str]:
        """Why a backend cannot take these inputs; empty when it can."""
        return self._ask(name, "unsupported_reasons", inputs)

    def _ask(self, name: str, question: str, inputs: tuple[Any, ...]) -> list[str]:
        ask = getattr(self.backends[name], question, None)
        return [] if ask is None else ask(*inputs)

    def explain(self, *inputs: Any) -> Explanation:
        """Ask all backends. Nothing is built or computed."""
        reasons = {name: self.unsupported_reasons(name, *inputs) for name in self.backends}
        skips = {name: self._ask(name, "auto_skip_reasons", inputs) for name, why in reasons.items() if not why}
        skips = {name: why for name, why in skips.items() if why}
        chosen = next((name for name in self.order if not reasons[name] and name not in skips), None)
        return Explanation(chosen, reasons, skips)

    def sample(
        self,
        shapes: SampleShapes,
        size: Size,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> list[Tensor]:
        """`inputs` on a device, in a type and the map in a layout; the same numbers each time."""
        x, *others = self.inputs(shapes, size)
        low = torch.float32 if self.parameters_stay_float32 else dtype
        return [x.to(device, dtype, memory_format=layout), *(other.to(device, low) for other in others)]


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of random numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_shapes(shapes: Mapping[str, str], *tensors: Tensor | None, **sizes: int) -> None:
    """Raise ValueError unless the tensors have their shapes; None stands for an omitted one.

    Args:
        shapes: by name, a character for each dimension, such as BCHW; 1 and 3 stand for themselves.
        sizes: of letters; the others have the size that they stand for first.
    """
    sizes["1"], sizes["3"] = 1, 3
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape)
        for letter, size in zip(shape, tensor.shape, strict=True) if fits else ():
            if sizes.setdefault(letter, size) != size:
                fits = False
        if not fits:
            known = (f"{each} = {sizes[each]}" if each.isalpha() and each in sizes else each for each in shape)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({', '.join(known)}).")


def check_norm(weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError where one of them is omitted."""
    if (weight is None) != (bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, or neither.")


def wants_gradients(*tensors: Tensor | None) -> bool:
    """True if gradients are recorded and one of the tensors requires one; None stands for an omitted tensor."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
