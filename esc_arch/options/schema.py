"""A JSON schema of option files, for completion and hints in editors.

It knows the types that are registered when it is made, and the arguments of their constructors. The checks before a run
see more: what belongs together, and what is on the disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.problems import join
from esc_arch.training.optimizers import OPTIMIZERS
from esc_arch.training.schedulers import SCHEDULERS

from .keys import IGNORED, KEYS, KINDS, OLD_NAMES, Key
from .section_checks import entries, is_known_code

__all__ = ["options_schema"]

Schema = dict[str, Any]

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
#: What BasicSR or PyTorch put in themselves.
_SUPPLIED = {"self", "params", "optimizer", "last_epoch", "scale_fn", "img", "img2", "verbose"}


def options_schema() -> Schema:
    """The schema, of draft 2020-12, with all types that are registered now.

    Sections that models or data sets of other packages may read, once such are registered, may have any keys.
    """
    special: dict[str, Schema] = {
        "model_type": {"enum": _names(entries(MODEL_REGISTRY))},
        "datasets:*:type": {"enum": _names(entries(DATASET_REGISTRY))},
        "datasets": {
            "type": "object",
            "minProperties": 1,
            "patternProperties": {"^(train|(val|test)(_.*)?)$": {"$ref": "#/$defs/dataset"}},
            "additionalProperties": False,
        },
        "network_*": _or_null("network"),
        "train:losses": _named("loss"),
        "train:scheduler": {"$ref": "#/$defs/scheduler"},
        "train:optim_*": _or_null("optimizer"),
        "val:metrics": _named("metric"),
        **{f"train:{name}": _or_null("loss") for name in KEYS["train"] if name.endswith("_opt")},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Option file of BasicSR with esc_arch",
        "description": "For basicsr train and basicsr test; basicsr check checks it.",
        **_section("", special),
        "$defs": {
            "dataset": _section("datasets:*", special),
            "network": _typed(entries(ARCH_REGISTRY)),
            "loss": _typed(entries(LOSS_REGISTRY)),
            "metric": _typed(entries(METRIC_REGISTRY), extra={"better": {"enum": ["higher", "lower"]}}),
            "optimizer": _typed(OPTIMIZERS, required=["lr"]),
            "scheduler": _typed(SCHEDULERS),
        },
    }


def _section(path: str, special: Mapping[str, Schema]) -> Schema:
    """A mapping with the keys of a table, and no others if all that may read it is known.

    `special` has the schemas of single keys by their paths.
    """
    properties: Schema = {key: {"deprecated": True, "description": "Has no effect."} for key in sorted(IGNORED)}
    for old, new in OLD_NAMES.items():
        properties[old] = {"deprecated": True, "description": f"Has no effect; its name is {new}."}
    patterns = {}
    for key, entry in KEYS[path].items():
        inner = join(path, key)
        schema = special.get(inner) or (_or_null(_section(inner, special)) if inner in KEYS else _value(entry))
        value = {"description": f"{entry.reader}: {entry.doc}" if entry.reader else entry.doc} | schema
        if key.endswith("*"):
            patterns[f"^{key[:-1]}.+$"] = value
        else:
            properties[key] = value
    readers = entries(DATASET_REGISTRY if path == "datasets:*" else MODEL_REGISTRY).values()
    return {
        "type": "object",
        "required": [key for key, entry in KEYS[path].items() if not entry.nullable and entry.default is None],
        "properties": properties,
        "patternProperties": patterns,
        "additionalProperties": not all(map(is_known_code, readers)),
    }


def _value(key: Key) -> Schema:
    """The values of an option."""
    bounds = {"minimum": key.least, "maximum": key.most, "exclusiveMinimum": key.above}
    limits = {name: bound for name, bound in bounds.items() if bound is not None}
    lists = {"items": {"type": "number", **limits}, "minItems": key.length or 0, "maxItems": key.length or 1000}
    added: dict[str, Schema] = {
        "int": limits,
        "number": limits,
        "numbers": lists,
        "texts": {"items": {"type": ["string", "null"]}},
    }
    choices = [*key.choices, *([None] if key.nullable else [])]
    options = [KINDS[kind].schema | added.get(kind, {}) for kind in key.kinds.split()]
    schema: Schema = {"anyOf": options + ([{"enum": choices}] if choices else [])}
    return schema if key.default is None else schema | {"default": key.default}


def _typed(
    kinds: Mapping[str, Any], *, required: Iterable[str] = (), extra: Mapping[str, Schema] | None = None
) -> Schema:
    """A mapping with a `type`, and the arguments of that type's constructor."""
    cases = [
        {"if": {"properties": {"type": {"enum": [name]}}}, "then": _call(kinds[name], required, extra or {})}
        for name in _names(kinds)
    ]
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": _names(kinds)}},
        "allOf": cases,
    }


def _call(kind: Any, required: Iterable[str], extra: Mapping[str, Schema]) -> Schema:
    parameters = [entry for entry in inspect.signature(kind).parameters.values() if entry.name not in _SUPPLIED]
    named = [entry for entry in parameters if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
    needed = {entry.name for entry in named if entry.default is entry.empty or entry.name in required}
    return {
        "description": (inspect.getdoc(kind) or "").partition("\n")[0],
        "properties": {"type": {}, **{entry.name: _argument(entry) for entry in named}, **extra},
        "required": sorted(needed),
        "additionalProperties": any(entry.kind is entry.VAR_KEYWORD for entry in parameters),
    }


def _argument(entry: inspect.Parameter) -> Schema:
    annotation = entry.annotation.__name__ if isinstance(entry.annotation, type) else str(entry.annotation)
    types = [_TYPES.get(part.strip()) for part in annotation.split("|")]
    schema: Schema = {} if None in types else {"type": types}
    if isinstance(entry.default, bool) and entry.annotation is entry.empty:
        schema["type"] = "boolean"
    if isinstance(entry.default, bool | int | float | str) and entry.default == entry.default:  # not NaN
        schema["default"] = entry.default
    return schema


def _names(kinds: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in kinds if not name.endswith("_basicsr"))


def _or_null(schema: str | Schema) -> Schema:
    """What a schema allows, or one of `$defs` by its name, and null."""
    return {"anyOf": [{"$ref": f"#/$defs/{schema}"} if isinstance(schema, str) else schema, {"type": "null"}]}


def _named(kind: str) -> Schema:
    """A mapping of freely chosen names."""
    return {"type": ["object", "null"], "additionalProperties": {"$ref": f"#/$defs/{kind}"}}
