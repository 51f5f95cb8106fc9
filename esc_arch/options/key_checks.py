"""Keys of an option file that nothing reads, and values of a wrong type or out of range.

What a model or data set of another package reads is not known: only common keys are checked there, and a key that
looks mistyped is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from esc_arch.names import nearest
from esc_arch.problems import Problem, join

from .files import Options
from .keys import IGNORED, KEYS, OLD_NAMES, Key, find_key
from .section_checks import check_values, is_esc_model, is_known

__all__ = ["check_keys"]

#: How alike a mistyped key and the one that was meant are at least: a letter more, less or exchanged. What differs
#: more (`gt_path` and `gt_size`) may as well be meant for something else.
_MISTYPED = 0.8
#: Options of ESCModel that another model must not ignore: results would not be what was asked for.
_NEVER_IGNORED = ("losses", "freeze", "lr_factors", "protocol", "per_image", "tb_images")


def check_keys(opt: Options, is_train: bool) -> Iterator[Problem]:
    """Unknown keys, and wrong values of known ones, in options as they were read, which have passed `check_shape`.

    Arguments of networks, losses, metrics, optimisers and schedulers are compared with constructors elsewhere. Sections
    that a test does not read are not checked.
    """
    model_is_known = is_known(MODEL_REGISTRY, opt.get("model_type"))
    for name in ("", "path", "train", "val", "logger") if is_train else ("", "path", "val"):
        section = (opt.get(name) if name else opt) or {}
        yield from _check_section(name, section, KEYS[name], model_is_known)
        if model_is_known and not is_esc_model(opt):
            yield from _unused_options(name, section, opt["model_type"])
    wandb = (opt.get("logger") or {}).get("wandb")
    if is_train and isinstance(wandb, dict):
        read = wandb if wandb.get("project") is not None else dict.fromkeys(wandb)  # without it, no value is read
        yield from _check_section("logger:wandb", read, KEYS["logger:wandb"], True)
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
        where = join(path, key)
        if find_key(table, key) is not None or key in IGNORED:
            continue
        if new_name := OLD_NAMES.get(key):
            yield Problem(where, f"will be ignored: in BasicSR 1.4.2 its name is {new_name!r}", "warning")
            continue
        guess = nearest(key, names)
        hint = f". Did you mean {guess!r}?" if guess else ""
        if nearest(key, names, cutoff=_MISTYPED):  # null asks for nothing: no harm is done if it is ignored
            yield Problem(where, f"unknown key{hint}", "error" if reader_is_known and value is not None else "warning")
        elif reader_is_known:
            yield Problem(where, f"unknown key; it will be ignored{hint}", "warning")


def _unused_options(path: str, section: Mapping[str, Any], model_type: str) -> Iterator[Problem]:
    """Options of ESCModel that are given to another model of BasicSR's."""
    for name, key in KEYS[path].items():
        if key.reader == "ESCModel" and section.get(name):
            message = f"{model_type} does not use it; ESCModel does. Change model_type, or remove it"
            yield Problem(join(path, name), message, "error" if name in _NEVER_IGNORED else "warning")
