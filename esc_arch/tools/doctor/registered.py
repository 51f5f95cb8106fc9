"""Which networks, models, data sets, losses and metrics option files can name, and whose they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from esc_arch.errors import UserError

from .context import Context
from .report import PROBLEM, WARNING, Finding
from .subprocess_worker import JobFailed

__all__ = ["examine"]

_KINDS = ("arch", "model", "dataset", "loss", "metric")


def examine(context: Context) -> Iterator[Finding]:
    """Names by registry and package, with their files; names of ours that others have; modules that fail."""
    if context.import_failure:
        yield Finding("names", "not known: esc_arch cannot be imported", WARNING)
        return
    from basicsr.utils import registry

    from esc_arch.register import OWN, others_of_our_names, without_own

    yield from _import_project(context)
    registries = {kind: getattr(registry, f"{kind.upper()}_REGISTRY") for kind in _KINDS}
    for kind, of_kind in registries.items():
        entries = without_own(of_kind._obj_map)
        files = {name: _file(entry) for name, entry in sorted(entries.items())}
        for package, names in _by_package(entries).items():
            yield Finding(f"{kind} of {package}", ", ".join(names), data={name: files[name] for name in names})
    for kind, of_kind in registries.items():
        for name, entry in others_of_our_names(of_kind).items():
            text, advice = f"is {entry.__module__}'s", f"Write {OWN}{name} in option files where esc_arch's is meant."
            yield Finding(f"{kind} {name}", text, WARNING, advice)


def _import_project(context: Context) -> Iterator[Finding]:
    """Import what --import and the option file name."""
    from esc_arch.project import import_modules

    named, file = {"--import": context.args.imports}, context.args.opt
    if file is not None:
        with suppress(JobFailed):  # the section of the option file says why
            opt = context.worker.call("esc_arch.tools.doctor.data_health:read_options", file)
            named["import"] = opt.get("import")
    for where, modules in named.items():
        try:
            import_modules(modules, where)
        except UserError as error:
            yield Finding(where, str(error).removeprefix(f"{where}: "), PROBLEM, "Its classes are not registered.")


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
