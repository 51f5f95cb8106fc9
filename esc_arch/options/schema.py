"""A JSON schema of option files, for completion and hints in editors.

It knows the types that are registered when it is made, and the arguments of their constructors. The checks before a run
see more: what belongs together, and what is on the disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

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
    models, datasets = entries(MODEL_REGISTRY), entries(DATASET_REGISTRY)
    known_models, known_datasets = (all(map(is_known_code, kinds.values())) for kinds in (models, datasets))
    losses = {name: _or_null("loss") for name in KEYS["train"] if name.endswith("_opt")}
    dataset = _section(KEYS["datasets:*"], known_datasets, ["type"], {"type": {"enum": _names(datasets)}})
    train = losses | {
        "losses": _named("loss"),
        "scheduler": {"$ref": "#/$defs/scheduler"},
        "optim_*": _or_null("optimizer"),
    }
    wandb = {"wandb": _or_null(_section(KEYS["logger:wandb"]))}
    sections = {
        "path": _or_null(_section(KEYS["path"], known_models)),
        "train": _or_null(_section(KEYS["train"], known_models, ["total_iter"], train)),
        "val": _or_null(_section(KEYS["val"], known_models, (), {"metrics": _named("metric")})),
        "logger": _or_null(_section(KEYS["logger"], known_models, (), wandb)),
        "model_type": {"enum": _names(models)},
        "network_*": _or_null("network"),
        "datasets": {
            "type": "object",
            "minProperties": 1,
            "patternProperties": {"^(train|(val|test)(_.*)?)$": dataset},
            "additionalProperties": False,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Option file of BasicSR with esc_arch",
        "description": "For basicsr train and basicsr test; basicsr check checks it.",
        **_section(KEYS[""], known_models, ["name", "model_type", "datasets"], sections),
        "$defs": {
            "network": _typed(entries(ARCH_REGISTRY)),
            "loss": _typed(entries(LOSS_REGISTRY)),
            "metric": _typed(entries(METRIC_REGISTRY), extra={"better": {"enum": ["higher", "lower"]}}),
            "optimizer": _typed(OPTIMIZERS, required=["lr"]),
            "scheduler": _typed(SCHEDULERS),
        },
    }


def _section(
    table: Mapping[str, Key],
    is_complete: bool = True,
    required: Iterable[str] = (),
    special: Mapping[str, Schema] | None = None,
) -> Schema:
    """A mapping with the keys of a table, and no others if it is complete; `special` has schemas of single keys."""
    schemas = {key: _value(entry) for key, entry in table.items()} | dict(special or {})
    docs = {key: f"{entry.reader}: {entry.doc}" if entry.reader else entry.doc for key, entry in table.items()}
    values = {key: {"description": docs[key]} | schema for key, schema in schemas.items()}
    deprecated = dict.fromkeys(sorted(IGNORED), "Has no effect.")
    deprecated |= {old: f"Has no effect; its name is {new}." for old, new in OLD_NAMES.items()}
    return {
        "type": "object",
        "required": list(required),
        "properties": {key: {"deprecated": True, "description": text} for key, text in deprecated.items()}
        | {key: value for key, value in values.items() if not key.endswith("*")},
        "patternProperties": {f"^{key[:-1]}.+$": value for key, value in values.items() if key.endswith("*")},
        "additionalProperties": not is_complete,
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
