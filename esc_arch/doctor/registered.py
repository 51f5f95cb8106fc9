"""Which networks, models, data sets, losses and metrics option files can name, and whose they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .context import Context
from .report import WARNING, Finding

__all__ = ["examine"]


def examine(context: Context) -> Iterator[Finding]:
    """Names by registry and package, with their files; and names of ours that others had taken."""
    if context.import_failure:
        yield Finding("names", "not known: esc_arch cannot be imported", WARNING)
        return
    from basicsr.utils import registry

    from esc_arch.registry import TAKEN

    for kind in ("arch", "model", "dataset", "loss", "metric"):
        entries = dict(getattr(registry, f"{kind.upper()}_REGISTRY")._obj_map)
        files = {name: _file(entry) for name, entry in sorted(entries.items())}
        for package, names in _by_package(entries).items():
            yield Finding(f"{kind} of {package}", ", ".join(names), data={name: files[name] for name in names})
    for (kind, name), (kept, refused) in sorted(TAKEN.items()):
        text = f"is {kept}'s; esc_arch's own, of {refused}, is not registered"
        yield Finding(f"{kind} {name}", text, WARNING, "Remove the other where esc_arch's is meant.")


def _by_package(entries: dict[str, Any]) -> dict[str, list[str]]:
    """esc_arch first, BasicSR last; other code by the module it is in."""
    groups: dict[str, list[str]] = {}
    for name, entry in sorted(entries.items()):
        package = entry.__module__.partition(".")[0]
        groups.setdefault(package if package in ("esc_arch", "basicsr") else entry.__module__, []).append(name)
    order = {"esc_arch": 0, "basicsr": 2}
    return dict(sorted(groups.items(), key=lambda group: (order.get(group[0], 1), group[0])))


def _file(entry: Any) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(entry))
    except TypeError:  # made without a file, in a console
        return None
    return str(Path(file).resolve()) if file else None
