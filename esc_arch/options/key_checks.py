"""Keys of an option file that nothing reads, and values of a wrong type or out of range.

An option file may be for a model or data set of another package, so what a key means is not decided by a list alone:
the source of the class that is named is looked into (`key_usage`). A key that nothing reads is an error when it is
almost a known one, as a mistyped key is, and a warning otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from esc_arch.models import ESCLTEModel
from esc_arch.suggestions import nearest

from . import keys
from .files import Options
from .key_usage import Usage, usage_of
from .keys import Key
from .section_checks import entries, sr_model

__all__ = ["UnknownKey", "check_values", "keys_that_model_reads", "unknown_keys"]

#: How alike a mistyped key and the one that was meant are at least: a letter more, less or exchanged. What differs
#: more (`gt_path` and `gt_size`) may as well be meant for something else.
_MISTYPED = 0.8
_KNOWN: dict[str, Mapping[str, Key]] = {
    "": keys.GENERAL, "path": keys.PATH, "train": keys.TRAIN, "val": keys.VAL, "logger": keys.LOGGER
}  # fmt: skip
#: Known too, but to some types only.
_OF_TYPES: dict[str, Mapping[str, Key]] = {
    "": keys.GENERAL_OF_MODELS, "train": keys.TRAIN_OF_MODELS, "val": keys.VAL_OF_MODELS
}  # fmt: skip


@dataclass(frozen=True)
class UnknownKey:
    """A key that nothing reads: a sentence `KEY[:KEY...]: text`, and whether it is surely a mistake."""

    problem: str
    is_error: bool


@dataclass(frozen=True)
class _Section:
    """What is known about a section's keys.

    Attributes:
        path: the section's own keys, joined by colons.
        known: the keys that something reads, whatever the types.
        beginnings: of keys that are made of a beginning and a name.
        reader: the type that may read further keys, as the file names it.
        usage: what it reads; None when the type is not known, or there is none.
        place: the section's keys within the options that the type gets.
        elsewhere: keys that other types read.
    """

    path: str
    known: set[str]
    beginnings: tuple[str, ...]
    reader: str | None
    usage: Usage | None
    place: tuple[str, ...]
    elsewhere: set[str]

    def unknown(self, given: Mapping[str, Any]) -> Iterator[UnknownKey]:
        read = self.known | (self.usage.keys(*self.place) if self.usage else set())
        for key in given:
            if key in read or any(key.startswith(beginning) and key != beginning for beginning in self.beginnings):
                continue
            if self.usage is None and self.reader is not None:
                continue  # the type is told to be wrong: what it would have read is not known
            if self.usage is not None and self.usage.is_open(*self.place):
                continue
            unknown = self._unknown(key, read | self._examples(given))
            # Null asks for nothing: no harm is done if it is not heard
            yield UnknownKey(unknown.problem, unknown.is_error and given[key] is not None)

    def _unknown(self, key: str, known: set[str]) -> UnknownKey:
        path = f"{self.path}:{key}" if self.path else key
        by = f"BasicSR and {self.reader} do not read it" if self.reader else "nothing reads it"
        if new_name := keys.OLD_NAMES.get(self.path, {}).get(key):
            return UnknownKey(f"{path}: has no effect: in BasicSR 1.4.2 its name is {new_name!r}", False)
        if key in self.elsewhere:
            return UnknownKey(f"{path}: has no effect: {by}, only other types do", False)
        guess = nearest(key, known)
        hint = f". Did you mean {guess!r}?" if guess else ""
        mistyped = nearest(key, known, cutoff=_MISTYPED) is not None
        usage = self.usage
        if usage is not None and (not usage.complete or key in usage.words):
            return UnknownKey(f"{path}: {by}, as far as its source tells{hint}", False)
        if mistyped:
            return UnknownKey(f"{path}: not known, {by}{hint}", True)
        return UnknownKey(f"{path}: {by}{hint}", False)

    def _examples(self, given: Mapping[str, Any]) -> set[str]:
        """Keys made of a beginning and a name, for names that the section has."""
        names = {"g", "d"} | {key.partition("_")[2] for key in given if key.startswith("network_")}
        return {beginning + name for beginning in self.beginnings for name in names}


def unknown_keys(opt: Options, is_train: bool) -> Iterator[UnknownKey]:
    """The keys of an option file, as it was read, that nothing reads; nothing is said about those of networks, losses,
    metrics, optimisers and schedulers, which `checks` compares with constructors.

    `opt` has passed `checks.check_shape`. Sections that a test does not look at are left out.
    """
    sections = ("", "path", "train", "val", "logger") if is_train else ("", "path", "val")
    for name in sections:
        given = opt if not name else opt.get(name)
        if isinstance(given, dict):
            yield from _model_section(name, opt).unknown(given)
    wandb = (opt.get("logger") or {}).get("wandb")
    if is_train and isinstance(wandb, dict):
        yield from _Section("logger:wandb", set(keys.WANDB), (), None, None, (), set()).unknown(wandb)
    for phase, dataset in opt["datasets"].items():
        yield from _dataset_section(phase, dataset).unknown(dataset)


def _model_section(name: str, opt: Options) -> _Section:
    place = (name,) if name else ()
    return _Section(
        path=name,
        known=set(_KNOWN[name]) | keys.UNUSED[name],
        beginnings=tuple(keys.PATTERNS.get(name, ())),
        reader=str(opt.get("model_type")),
        usage=_usage(MODEL_REGISTRY, opt.get("model_type")),
        place=place,
        elsewhere=set(_OF_TYPES.get(name, ())),
    )


def _dataset_section(phase: str, dataset: Options) -> _Section:
    return _Section(
        path=f"datasets:{phase}",
        known=set(keys.DATASET) | keys.UNUSED["datasets"],
        beginnings=(),
        reader=str(dataset.get("type")),
        usage=_usage(DATASET_REGISTRY, dataset.get("type")),
        place=(),
        elsewhere=set(keys.DATASET_TYPES),
    )


def _usage(registry: Any, name: Any) -> Usage | None:
    kind = entries(registry).get(name) if isinstance(name, str) else None
    return usage_of(kind) if isinstance(kind, type) else None


def keys_that_model_reads(opt: Options, section: str) -> set[str]:
    """The keys of a section that the class of `model_type` reads."""
    usage = _usage(MODEL_REGISTRY, opt.get("model_type"))
    return usage.keys(section) if usage else set()


def check_values(opt: Options, is_train: bool) -> Iterator[str]:
    """Values of a wrong type or out of range, of keys whose meaning is known.

    Those that only some types read are looked at when BasicSR's or our types are named: others may mean something else.
    """
    sections = ("", "path", "train", "val", "logger") if is_train else ("", "path", "val")
    for name in sections:
        given = opt if not name else opt.get(name)
        if isinstance(given, dict):
            known = dict(_KNOWN[name])
            if _is_basicsr_s_or_ours(MODEL_REGISTRY, opt.get("model_type")):
                known |= _OF_TYPES.get(name, {})
            yield from _wrong_values(name, given, known, keys.PATTERNS.get(name, {}))
    if is_train:
        for path, loss in _losses(opt.get("train")):
            yield from _wrong_values(path, loss, keys.LOSS, {})
    model = opt.get("model_type")
    metrics = opt["val"].get("metrics") if isinstance(opt.get("val"), dict) else None
    for name, metric in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(metric, dict) and _is_basicsr_s_or_ours(METRIC_REGISTRY, metric.get("type")):
            yield from _wrong_values(f"val:metrics:{name}", metric, keys.METRIC, {})
            others = _is_basicsr_s_or_ours(MODEL_REGISTRY, model) and sr_model(opt) is not ESCLTEModel
            if metric.get("crop_border") == "scale" and others:
                yield f"val:metrics:{name}:crop_border: 'scale' given, which only ESCLTEModel knows; give a number"
    for phase, dataset in opt["datasets"].items():
        known = dict(keys.DATASET)
        if _is_basicsr_s_or_ours(DATASET_REGISTRY, dataset.get("type")):
            known |= keys.DATASET_TYPES
        yield from _wrong_values(f"datasets:{phase}", dataset, known, {})


def _losses(train: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """BasicSR's and our losses in `train:`, with their keys."""
    given = train if isinstance(train, dict) else {}
    losses = given.get("losses")
    named = losses if isinstance(losses, dict) else {}
    found = [(f"train:{name}", loss) for name, loss in given.items() if name.endswith("_opt")]
    for path, loss in [*found, *((f"train:losses:{name}", loss) for name, loss in named.items())]:
        if isinstance(loss, dict) and _is_basicsr_s_or_ours(LOSS_REGISTRY, loss.get("type")):
            yield path, loss


def _wrong_values(
    path: str, given: Mapping[str, Any], known: Mapping[str, Key], patterns: Mapping[str, Key]
) -> Iterator[str]:
    for name, value in given.items():
        key = known.get(name) or next((key for start, key in patterns.items() if name.startswith(start)), None)
        if key is not None and not key.takes(value):
            yield f"{path}:{name}".lstrip(":") + f": {value!r} given; must be {key.wanted}"


def _is_basicsr_s_or_ours(registry: Any, name: Any) -> bool:
    kind = entries(registry).get(name) if isinstance(name, str) else None
    return kind is not None and kind.__module__.partition(".")[0] in ("basicsr", "esc_arch")
