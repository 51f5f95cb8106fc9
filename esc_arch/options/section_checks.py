"""What sections may have: keys and values of the table, registered names, arguments of constructors.

What a model or data set of another package reads is not known: only common keys are checked there, and a key that
looks mistyped is a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from esc_arch.models import ESCModel
from esc_arch.names import did_you_mean, nearest, without_own
from esc_arch.problems import Problem, join, wrong_value
from esc_arch.system import memory_sizes

from .files import Options
from .keys import IGNORED, KEYS, OLD_NAMES, Key, find_key

__all__ = [
    "QUICK",
    "CheckScope",
    "check_call",
    "check_keys",
    "check_type",
    "check_values",
    "entries",
    "is_esc_model",
    "is_integer",
    "is_known",
    "is_known_code",
    "lacks_memory",
    "metrics_of",
    "missing_keys",
    "shown_names",
    "sr_model",
]

#: How alike a mistyped key and the one that was meant are at least: a letter more, less or exchanged. What differs
#: more (`gt_path` and `gt_size`) may as well be meant for something else.
_MISTYPED = 0.8
#: Options of ESCModel that another model must not ignore: results would not be what was asked for.
_NEVER_IGNORED = ("losses", "freeze", "lr_factors", "protocol", "per_image", "tb_images")


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


#: What takes next to no time, before a run.
QUICK = CheckScope()


def check_keys(opt: Options, is_train: bool) -> Iterator[Problem]:
    """Unknown keys, and wrong values of known ones, in options as they were read, which have passed `check_shape`.

    Arguments of networks, losses, metrics, optimisers and schedulers are compared with constructors elsewhere. Sections
    that a test does not read are not checked.
    """
    model_is_known = is_known(MODEL_REGISTRY, opt.get("model_type"))
    for name in ("", "path", "train", "val", "logger") if is_train else ("", "path", "val"):
        section = (opt.get(name) if name else opt) or {}
        yield from _check_section(name, section, KEYS[name], model_is_known)
        for key in section.keys() & KEYS[name] if model_is_known and not is_esc_model(opt) else ():
            if KEYS[name][key].reader == "ESCModel" and section[key]:
                message = f"{opt['model_type']} does not use it; ESCModel does. Change model_type, or remove it"
                yield Problem(join(name, key), message, "error" if key in _NEVER_IGNORED else "warning")
    wandb = (opt.get("logger") or {}).get("wandb")
    if is_train and isinstance(wandb, dict):
        yield from _check_section("logger:wandb", wandb, KEYS["logger:wandb"], True)
    for phase, dataset in opt["datasets"].items():
        known = is_known(DATASET_REGISTRY, dataset.get("type"))
        yield from _check_section(f"datasets:{phase}", dataset, KEYS["datasets:*"], known)


def _check_section(
    path: str, section: Mapping[str, Any], table: Mapping[str, Key], reader_is_known: bool
) -> Iterator[Problem]:
    known = {key: entry for key, entry in table.items() if reader_is_known or not entry.reader}
    yield from check_values(path, section, known)
    # Names for patterns such as optim_*: those of the networks, and of the two that every GAN has
    labels = {"g", "d"} | {key.partition("_")[2] for key in section if key.startswith("network_")}
    names = {key.replace("*", label) for key in table for label in labels}
    for key, value in section.items():
        if find_key(table, key) is not None or key in IGNORED:
            continue
        where, guess = join(path, key), nearest(key, names)
        hint = f". Did you mean {guess!r}?" if guess else ""
        if key in OLD_NAMES:
            yield Problem(where, f"will be ignored: in BasicSR 1.4.2 its name is {OLD_NAMES[key]!r}", "warning")
        elif nearest(key, names, cutoff=_MISTYPED):  # null asks for nothing: no harm is done if it is ignored
            yield Problem(where, f"unknown key{hint}", "error" if reader_is_known and value is not None else "warning")
        elif reader_is_known:
            yield Problem(where, f"unknown key; it will be ignored{hint}", "warning")


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


def lacks_memory(size: float) -> str:
    """Why so many bytes cannot be had; empty if this machine may have them."""
    memory, _ = memory_sizes()
    return f"{size / 2**30:,.0f} GiB; this machine has {memory / 2**30:,.0f} GiB" if size > memory else ""


def is_integer(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
