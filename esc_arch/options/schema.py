"""A JSON schema of option files, for completion and hints in editors.

It knows the types that are registered when it is made, and the arguments of their constructors. The checks before a run
see more: what belongs together, what is on the disk, and what classes of other packages read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.register import OWN
from esc_arch.training.optimizers import OPTIMIZERS
from esc_arch.training.schedulers import SCHEDULERS

from . import keys
from .key_usage import Usage, usage_of
from .keys import Key
from .section_checks import entries, shown_names

__all__ = ["options_schema"]

Schema = dict[str, Any]

_NAMES = r"[A-Za-z_]\w*"
_ARGUMENT = re.compile(rf"^ {{4,}}({_NAMES})(?: \(.*?\))?: (.*)$")
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
#: What BasicSR or PyTorch put in themselves.
_SUPPLIED = {"self", "params", "optimizer", "last_epoch", "scale_fn", "img", "img2", "verbose"}


def options_schema() -> Schema:
    """The schema, of draft 2020-12, with all types that are registered now."""
    models, datasets = entries(MODEL_REGISTRY), entries(DATASET_REGISTRY)
    usages = [usage_of(kind) for kind in models.values() if isinstance(kind, type)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Option file of BasicSR with esc_arch",
        "description": "For basicsr train and basicsr test; what stands in it is checked by basicsr check.",
        **_section(
            keys.GENERAL | keys.GENERAL_OF_MODELS,
            _read(usages),
            required=["name", "model_type", "datasets"],
            sections={
                "model_type": {"enum": _names(models)},
                "datasets": _datasets(datasets),
                "path": _section(
                    keys.PATH,
                    _read(usages, "path"),
                    sections=_old_names("path"),
                    patterns=keys.PATTERNS["path"],
                ),
                "train": _train(usages),
                "val": _section(
                    keys.VAL | keys.VAL_OF_MODELS, _read(usages, "val"), sections={"metrics": _named("metric")}
                ),
                "logger": _section(keys.LOGGER, _read(usages, "logger"), sections={"wandb": _section(keys.WANDB, ())}),
                "dist_params": {"type": ["object", "null"]},
                **_without_effect(["gpu_ids", "set_CUDA_VISIBLE_DEVICES"]),
            },
            pattern_sections={"^network_.+$": {"$ref": "#/$defs/network"}},
        ),
        "$defs": {
            "network": _typed(entries(ARCH_REGISTRY)),
            "loss": _typed(entries(LOSS_REGISTRY)),
            "metric": _typed(entries(METRIC_REGISTRY), extra={"better": {"enum": ["higher", "lower"]}}),
            "optimizer": _typed(OPTIMIZERS, required=["lr"]),
            "scheduler": _typed(SCHEDULERS),
        },
    }


def _train(usages: Iterable[Usage]) -> Schema:
    known = keys.TRAIN | keys.TRAIN_OF_MODELS
    losses = {key: _optional("loss") for key in known if key.endswith("_opt")}
    return _section(
        known,
        _read(usages, "train"),
        required=["total_iter"],
        sections={
            **_old_names("train"),
            **losses,
            "losses": _named("loss"),
            "scheduler": {"$ref": "#/$defs/scheduler"},
        },
        pattern_sections={"^optim_.+$": _optional("optimizer")},
    )


def _datasets(kinds: Mapping[str, Any]) -> Schema:
    """A data set each for train, val, val_NAME, test and test_NAME."""
    cases = []
    for name in shown_names(kinds):
        usage = usage_of(kinds[name])
        read = usage.keys()
        properties = {key: _value(keys.DATASET_TYPES[key]) if key in keys.DATASET_TYPES else {} for key in sorted(read)}
        without_effect = _without_effect(keys.DATASET_TYPES.keys() | keys.UNUSED["datasets"])
        schema = {"properties": without_effect | properties | _values(keys.DATASET), "additionalProperties": False}
        cases.append(_case(name, kinds, schema))
    dataset = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"description": keys.DATASET["type"].description, "enum": _names(kinds)}},
        "allOf": cases,
    }
    return {
        "description": keys.GENERAL["datasets"].description,
        "type": "object",
        "minProperties": 1,
        "patternProperties": {"^(train|(val|test)(_.*)?)$": dataset},
        "additionalProperties": False,
    }


def _section(
    known: Mapping[str, Key],
    read: Iterable[str],
    *,
    required: Iterable[str] = (),
    sections: Mapping[str, Schema] | None = None,
    patterns: Mapping[str, Key] | None = None,
    pattern_sections: Mapping[str, Schema] | None = None,
) -> Schema:
    """A mapping with known keys, keys that some model reads, and sections within it."""
    inner = sections or {}
    properties: Schema = {key: {} for key in sorted(read)} | _values(known)
    for key, schema in inner.items():
        described = {"description": known[key].description} if key in known else {}
        properties[key] = schema if "description" in schema else described | schema
    of_patterns = {f"^{start}.+$": _value(key) for start, key in (patterns or {}).items()} | dict(
        pattern_sections or {}
    )
    for pattern in of_patterns:  # they say more than that there is a mapping
        properties = {key: schema for key, schema in properties.items() if not re.match(pattern, key)}
    section: Schema = {
        "type": "object" if required else ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        section["required"] = list(required)
    if of_patterns:
        section["patternProperties"] = of_patterns
    return section


def _read(usages: Iterable[Usage], *section: str) -> set[str]:
    """The keys of a section that models read, but for what BasicSR puts there itself."""
    return {key for usage in usages for key in usage.keys(*section)} - keys.UNUSED[section[0] if section else ""]


def _typed(
    kinds: Mapping[str, Any], *, required: Iterable[str] = (), extra: Mapping[str, Schema] | None = None
) -> Schema:
    """A mapping with a `type`, and the arguments of that type's constructor."""
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": _names(kinds)}},
        "allOf": [_case(name, kinds, _call(kinds[name], required, extra or {})) for name in shown_names(kinds)],
    }


def _case(name: str, kinds: Mapping[str, Any], then: Schema) -> Schema:
    """What holds for a type, by either of its names."""
    names = [spelling for spelling in (name, OWN + name) if kinds.get(spelling) is kinds[name]]
    return {"if": {"properties": {"type": {"enum": names}}, "required": ["type"]}, "then": then}


def _call(kind: Any, required: Iterable[str], extra: Mapping[str, Schema]) -> Schema:
    parameters = [entry for entry in inspect.signature(kind).parameters.values() if entry.name not in _SUPPLIED]
    named = [entry for entry in parameters if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
    texts = _descriptions(kind)
    properties: Schema = (
        {"type": {}} | {entry.name: _argument(entry, texts.get(entry.name)) for entry in named} | dict(extra)
    )
    needed = {entry.name for entry in named if entry.default is entry.empty}.union(required) & properties.keys()
    schema: Schema = {"properties": properties}
    if first := (inspect.getdoc(kind) or "").partition("\n")[0]:
        schema["description"] = first
    if needed:
        schema["required"] = sorted(needed)
    if not any(entry.kind is entry.VAR_KEYWORD for entry in parameters):
        schema["additionalProperties"] = False
    return schema


def _argument(entry: inspect.Parameter, text: str | None) -> Schema:
    schema: Schema = {"description": text} if text else {}
    kinds = [part.strip() for part in str(entry.annotation).split("|")]
    if isinstance(entry.annotation, type):
        kinds = [entry.annotation.__name__]
    types = [_TYPES.get(kind, "null" if kind == "None" else None) for kind in kinds]
    if None not in types:
        schema["type"] = types[0] if len(types) == 1 else types
    elif isinstance(entry.default, bool) and entry.annotation is entry.empty:
        schema["type"] = "boolean"
    if isinstance(entry.default, bool | int | float | str) and entry.default == entry.default:
        schema["default"] = entry.default
    return schema


def _descriptions(kind: Any) -> dict[str, str]:
    """What the docstrings of a class or function say about its arguments, in the part that `Args:` begins."""
    texts: dict[str, str] = {}
    for thing in reversed([*getattr(kind, "__mro__", [kind]), getattr(kind, "__init__", None)]):
        if getattr(thing, "__module__", "").partition(".")[0] not in ("basicsr", "esc_arch"):
            continue
        current = None
        for line in (inspect.getdoc(thing) or "").partition("Args:\n")[2].splitlines():
            if found := _ARGUMENT.match(line):
                current = found[1]
                texts[current] = found[2].strip()
            elif current and line.startswith(" " * 8):
                texts[current] += f" {line.strip()}"
            elif not line.startswith(" "):
                break
    return texts


def _names(kinds: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in kinds if not name.endswith("_basicsr"))


def _optional(name: str) -> Schema:
    return {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}


def _named(kind: str) -> Schema:
    """A mapping of freely chosen names."""
    return {"type": ["object", "null"], "additionalProperties": {"$ref": f"#/$defs/{kind}"}}


def _values(known: Mapping[str, Key]) -> Schema:
    return {name: _value(key) for name, key in known.items()}


def _value(key: Key) -> Schema:
    return {"description": key.description, **_or_null(key.schema)}


def _or_null(schema: Mapping[str, Any]) -> Schema:
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [*schema["anyOf"], {"type": "null"}]}


def _without_effect(names: Iterable[str]) -> Schema:
    return {name: {"deprecated": True, "description": "Has no effect here."} for name in sorted(names)}


def _old_names(section: str) -> Schema:
    return {
        old: {"deprecated": True, "description": f"Of older versions of BasicSR, without effect; now {new}."}
        for old, new in keys.OLD_NAMES.get(section, {}).items()
    }
