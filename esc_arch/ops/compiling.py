"""What torch.compile is told about functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_when_compiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Have torch.compile call `function` while it compiles, and take the result for granted.

    As `torch.compiler.assume_constant_result`, which imports the compiler to do so: a second that who only enlarges an
    image would wait for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
