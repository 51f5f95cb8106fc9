"""The choice among backends: who is asked, in what order, how often, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from networks import normal
from torch import Tensor

from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.operation import Operation, SampleShapes

SHAPES = SampleShapes(channels=8, heads=2, window=4, pdim=4, kernel_size=5, hidden=10)


@pytest.fixture
def asked() -> list[str]:
    """The backends that were asked whether they can take the inputs."""
    return []


@pytest.fixture
def make(asked: list[str]) -> Callable[..., Operation]:
    """Makes an operation of backends with these reasons against them."""

    def make(**reasons: list[str]) -> Operation:
        def backend(name: str) -> ModuleType:
            def unsupported_reasons(x: Tensor) -> list[str]:
                asked.append(name)
                return reasons[name]

            return cast(ModuleType, SimpleNamespace(unsupported_reasons=unsupported_reasons, forward=lambda x: name))

        order = tuple(reasons)
        return Operation("thing", "thing_type", {name: backend(name) for name in order}, order, Any, Any, ())  # type: ignore[arg-type]

    return make


def test_auto_takes_the_first_that_can(make: Any, asked: list[str]) -> None:
    chosen = make(first=["too old"], second=[], third=[]).choose("auto", normal(2))
    assert chosen.forward(None) == "second"
    assert asked == ["first", "second"]


def test_all_reasons_are_told(make: Any) -> None:
    thing = make(first=["too old"], second=["too small", "too slow"], third=["too new"])
    with pytest.raises(RuntimeError, match=r"first: too old\. second: too small; too slow\. third: too new\. Use"):
        thing.choose("auto", normal(2))
    with pytest.raises(RuntimeError, match=r"^thing_type second cannot run here\. second: too small; too slow\. Use"):
        thing.choose("SECOND", normal(2))
    with pytest.raises(ValueError, match=r"thing_type 'fourth' is not known; allowed: auto, first, second, third \(in"):
        thing.choose("fourth", normal(2))


def test_what_auto_skips_is_taken_by_name(make: Any) -> None:
    thing = make(first=[], second=[])
    thing.backends["first"].auto_skip_reasons = lambda x: ["not tried"]
    assert thing.choose("auto", normal(2)).forward(None) == "second"
    assert thing.choose("first", normal(2)).forward(None) == "first"
    assert thing.explain(normal(2)) == ("second", {"first": [], "second": []}, {"first": ["not tried"]})


def test_the_earlier_spelling() -> None:
    assert OPERATIONS["window attention"].resolve("CPP") == "cpu"


@pytest.mark.parametrize("name", OPERATIONS)
def test_samples(name: str) -> None:
    """The reference takes them, its first gradient is the map's, and they are the same each time."""
    described = OPERATIONS[name]
    tensors, again = (described.sample(SHAPES, (2, 5, 6)) for _ in range(2))
    assert all(map(torch.equal, tensors, again))
    assert next(iter(described.backends.values())) is described.reference
    assert set(described.order) <= set(described.backends)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = described.reference.forward(*described.arguments(SHAPES, leaves))
    assert len(torch.autograd.grad(out.sum(), leaves, materialize_grads=True)) + 1 <= len(described.parts)
