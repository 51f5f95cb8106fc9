"""What the checks of an option file share: values that the table of keys allows, registered names, arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY

from esc_arch.models import ESCModel
from esc_arch.names import did_you_mean, nearest, without_own
from esc_arch.problems import Problem, join, wrong_value

from .files import Options
from .keys import Key, find_key

__all__ = [
    "CheckScope",
    "check_call",
    "check_type",
    "check_values",
    "entries",
    "is_esc_model",
    "is_integer",
    "is_known",
    "is_known_code",
    "metrics_of",
    "missing_keys",
    "shown_names",
    "sr_model",
]


@dataclass(frozen=True)
class CheckScope:
    """How much of what an option file names is checked.

    Attributes:
        thorough: the sizes of up to 4,000 pairs of each data set instead of 64; what is in LMDBs and not only their
            lists; networks of other packages that cannot be built without memory.
        with_files: the data, weights and GPUs that the file names, too.
    """

    thorough: bool = False
    with_files: bool = True


def check_values(path: str, section: Mapping[str, Any], table: Mapping[str, Key]) -> Iterator[Problem]:
    """Check those values of the section at `path` whose keys are in the table."""
    for name, value in section.items():
        key = find_key(table, name)
        if key is not None and not key.accepts(value):
            guess = nearest(value, key.choices) if not key.kinds else None
            yield wrong_value(join(path, name), value, key.wanted + (f". Did you mean {guess!r}?" if guess else ""))


def missing_keys(
    path: str, section: Mapping[str, Any], table: Mapping[str, Key], required: Iterable[str]
) -> Iterator[Problem]:
    for name in required:
        if section.get(name) is None:
            yield Problem(join(path, name), f"missing; give {table[name].wanted}")


def check_type(path: str, name: Any, known: Mapping[str, Any], *, registered: bool = True) -> Iterator[Problem]:
    """Check that a name is one of those known; `registered`: in one of BasicSR's registries."""
    names = shown_names(known)
    if name is None:
        yield Problem(path, f"missing. Allowed: {', '.join(names)}")
    elif not isinstance(name, str) or name not in known:
        hint = ". If it is of your own package, name the module: --import MODULE, or import: in the option file"
        yield Problem(path, f"{name!r} is not known. {did_you_mean(name, names)}{hint * registered}")


def check_call(
    path: str,
    section: Any,
    known: Mapping[str, Any],
    *,
    supplied: Iterable[str] = (),
    needed: Iterable[str] = (),
    extra: Iterable[str] = (),
    registered: bool = True,
    table: Mapping[str, Key] | None = None,
) -> Iterator[Problem]:
    """Check that `known[section['type']]` can be called with the rest of `section`.

    BasicSR supplies the arguments `supplied` itself and takes the keys `extra` out; keys `needed` must
    be given though the callable has defaults for them. `registered` is as of `check_type`. The table has values that
    BasicSR's classes and ours take.
    """
    if not isinstance(section, dict):
        yield wrong_value(path, section, "a mapping with type and its arguments")
        return
    problems = list(check_type(f"{path}:type", section.get("type"), known, registered=registered))
    yield from problems
    if problems:
        return
    kind = known[section["type"]]
    parameters = inspect.signature(kind).parameters.values()
    named = {
        entry.name: entry
        for entry in parameters
        if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY) and entry.name not in supplied
    }
    if not any(entry.kind is entry.VAR_KEYWORD for entry in parameters):
        whose = f" of {kind.__module__}" if registered and not is_known_code(kind) else ""
        for key in sorted(section.keys() - named.keys() - {"type", *extra}):
            yield Problem(f"{path}:{key}", f"{section['type']}{whose} has no such argument. {did_you_mean(key, named)}")
    required = {name for name, entry in named.items() if entry.default is entry.empty}
    for key in sorted(required.union(needed) - section.keys()):
        yield Problem(f"{path}:{key}", f"missing; {section['type']} needs it")
    if table and is_known_code(kind):
        yield from check_values(path, section, table)


def entries(registry: Any) -> dict[str, Any]:
    """What a BasicSR registry holds, its own entries by their short names too, as `Registry.get` finds them."""
    entries = dict(iter(registry))
    short = {name.removesuffix("_basicsr"): entry for name, entry in entries.items()}
    return short | entries


def shown_names(known: Mapping[str, Any]) -> list[str]:
    """The names of `entries`, in order, each class by its short name if that is its own."""
    return sorted(name for name in without_own(known) if not name.endswith("_basicsr"))


def sr_model(opt: Options) -> type[SRModel] | None:
    """The class of `model_type` if it is a kind of SRModel: others may use the options in their own way."""
    model = entries(MODEL_REGISTRY).get(str(opt.get("model_type")))
    return model if inspect.isclass(model) and issubclass(model, SRModel) else None


def is_esc_model(opt: Options) -> bool:
    """True if `model_type` is an `ESCModel`, which has options of its own."""
    model = sr_model(opt)
    return model is not None and issubclass(model, ESCModel)


def metrics_of(opt: Options) -> dict[str, Options]:
    """The sections of `val: metrics:`, those that are mappings."""
    metrics = (opt.get("val") or {}).get("metrics")
    return {k: v for k, v in metrics.items() if isinstance(v, dict)} if isinstance(metrics, dict) else {}


def is_known_code(thing: Any) -> bool:
    """True if a class, or a method, is BasicSR's or ours, so that what it does with options is known."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] in ("basicsr", "esc_arch")


def is_known(registry: Any, name: Any) -> bool:
    """True if a name in a registry is that of known code."""
    return isinstance(name, str) and is_known_code(entries(registry).get(name))


def is_integer(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
