"""Registration in BasicSR's registries, once, in whatever order things are imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from basicsr.utils.registry import Registry

__all__ = ["TAKEN", "register"]

T = TypeVar("T", bound=type)

#: By registry and name: the module whose class was kept, and the one of esc_arch whose class was refused.
TAKEN: dict[tuple[str, str], tuple[str, str]] = {}


def register(registry: Registry, *names: str) -> Callable[[T], T]:
    """A class decorator that registers under the given names (default: the class's own).

    BasicSR's own registration fails with an AssertionError when a name is taken. A name taken by an earlier import
    of esc_arch is renewed; one taken by other code is left to it, with a warning that says whose it is.
    """

    def decorate(cls: T) -> T:
        for name in names or (cls.__name__,):
            known = registry._obj_map.get(name)
            if known is not None and not known.__module__.startswith("esc_arch."):
                TAKEN[registry._name, name] = known.__module__, cls.__module__
                warnings.warn(
                    f"{name!r} is in BasicSR's {registry._name} registry already, from {known.__module__}: that one is "
                    f"kept, and esc_arch's is not registered. Remove the other to use esc_arch's.",
                    stacklevel=2,
                )
            else:
                registry._obj_map[name] = cls
        return cls

    return decorate
