"""What the source of classes tells about the options that they read."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from typing import Any

import pytest
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

import esc_arch  # noqa: F401  registers its own
from esc_arch.options.key_usage import usage_of
from esc_arch.options.keys import (
    DATASET,
    DATASET_TYPES,
    GENERAL,
    GENERAL_OF_MODELS,
    TRAIN,
    TRAIN_OF_MODELS,
    UNUSED,
    VAL,
    VAL_OF_MODELS,
)
from esc_arch.options.section_checks import entries

READ_BY_NAME = re.compile(r"\bopt(?:\[|\.get\()['\"](\w+)['\"]")


@pytest.mark.parametrize(
    "kind",
    [*dict(iter(MODEL_REGISTRY)).values(), *dict(iter(DATASET_REGISTRY)).values()],
    ids=lambda kind: kind.__name__,
)
def test_what_a_search_finds_is_found(kind: type) -> None:
    """A plain search for opt['x'] and opt.get('x') in the source of a class, and of those that it derives from."""
    usage = usage_of(kind)
    source = "".join(
        inspect.getsource(base) for base in kind.__mro__ if base.__module__.startswith(("basicsr.", "esc_arch."))
    )
    source = source.replace("dataset.opt", "")  # another one's
    found = set(READ_BY_NAME.findall(source))
    assert usage.complete and found and found <= usage.keys() | {"key"}
    assert not usage.is_open() and not usage.is_open("train") and not usage.is_open("val") and not usage.is_open("path")


def test_sections_are_told_apart() -> None:
    usage = usage_of(SRModel)
    assert {"ema_decay", "optim_g", "scheduler", "pixel_opt", "perceptual_opt"} == usage.keys("train")
    assert {"metrics", "pbar", "suffix"} == usage.keys("val")
    assert not {"ema_decay"} & usage.keys() and "metrics" not in usage.keys("train")
    assert usage.is_open("network_g") and usage.is_open("train", "pixel_opt", "any")


def test_every_key_that_is_read_is_described() -> None:
    for kind in entries(MODEL_REGISTRY).values():
        if kind.__module__.startswith(("basicsr.", "esc_arch.")):
            usage = usage_of(kind)
            general = set(filter(lambda key: not key.startswith("network_"), usage.keys()))
            assert general <= GENERAL.keys() | GENERAL_OF_MODELS.keys() | UNUSED[""]
            train = {key for key in usage.keys("train") if not key.startswith("optim_")}
            assert train <= TRAIN.keys() | TRAIN_OF_MODELS.keys()
            assert usage.keys("val") <= VAL.keys() | VAL_OF_MODELS.keys()
    for kind in entries(DATASET_REGISTRY).values():
        if kind.__module__.startswith(("basicsr.", "esc_arch.")):
            assert usage_of(kind).keys() <= DATASET.keys() | DATASET_TYPES.keys() | UNUSED["datasets"]


KEYS = ("from_a_tuple", "and_another")


def helper(options: Any, more: Any = None) -> Any:
    return options["in_a_helper"], more and more.get("in_a_keyword")


class Base:
    def __init__(self, config: Any) -> None:
        self.kept = config
        self.section = (config.get("section") or {}).copy()
        self.copied = deepcopy(config)


class Other(Base):
    """Reads options in many ways."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first, second = config["first"], config.get("second", config["default"])
        self.numbers = first, second
        part = config["part"] if "condition" in config else config["else"]
        part["of_part"]
        helper(config, more=config["handed"])
        self.method(config)
        for key in KEYS:
            config[key]

    def method(self, given: Any) -> Any:
        return given["in_a_method"], self.section["in_section"], self.copied["through_a_copy"], self.kept.pop("popped")


def test_ways_to_read() -> None:
    usage = usage_of(Other)
    assert usage.keys() == {
        "section", "first", "second", "default", "part", "condition", "else", "in_a_helper", "handed", "from_a_tuple",
        "and_another", "in_a_method", "through_a_copy", "popped",
    }  # fmt: skip
    assert usage.keys("section") == {"in_section"} and usage.keys("part") == usage.keys("else") == {"of_part"}
    assert usage.keys("handed") == {"in_a_keyword"}
    assert not usage.is_open() and usage.complete


class Requiring:
    """Some keys are required in any case, some in training; none of the others surely is."""

    def __init__(self, opt: Any) -> None:
        if not opt["required"]:
            raise ValueError
        self.opt, self.renamed = opt, opt
        opt["set"] = opt.setdefault("by_default", 1)
        self.some = opt["set"], opt["by_default"], self.renamed["also"], [opt["in_a_list"]]
        self.other = opt["either"] if "either" in opt else opt.get("or")
        self.both = self.other or opt["or_else"]
        if opt["phase"] == "train":
            self.size = opt["in_training"]
            if self.size:
                self.size = opt["perhaps"]
        else:
            self.size = opt["otherwise"]
        for key in KEYS:
            self.some = opt[key]
        try:
            self.some = opt["tried"]
        except KeyError:
            return
        self.late = opt["behind_a_return"]

    def __getitem__(self, index: int) -> Any:
        return self.opt["of_an_item"]


class Inheriting(Requiring):
    def __init__(self, opt: Any) -> None:
        super().__init__(opt)
        helper(opt)
        self.more = opt["behind_what_may_add_it"]

    def __getitem__(self, index: int) -> Any:
        return self.opt["own_item"]


class NotInheriting(Requiring):
    def __init__(self, opt: Any) -> None:
        opt = {"preset": 1, **opt}
        self.more = opt["preset"]


def test_what_is_required() -> None:
    usage = usage_of(Requiring)
    assert usage.requires == {"required", "also", "in_a_list", "phase", "of_an_item"}
    assert usage.requires_in_training == usage.requires | {"in_training"}
    assert usage_of(Inheriting).requires == {"required", "also", "in_a_list", "phase", "own_item"}
    assert usage_of(NotInheriting).requires == {"of_an_item"}


class Expanding:
    def __init__(self, opt: Any) -> None:
        self.net = SRModel(**opt["net"])
        self.opt = opt


class GoingThrough:
    def __init__(self, opt: Any) -> None:
        for key, value in opt.items():
            setattr(self, key, value)


class Computing:
    def __init__(self, opt: Any) -> None:
        self.value = opt["train"][f"weight_{opt['name']}"]


class HandingOn:
    def __init__(self, opt: Any) -> None:
        BaseModel(opt["base"])
        re.compile(opt["pattern"])
        self.other = opt["unknown"].anything(opt["to_a_method"])


@pytest.mark.parametrize(
    ("kind", "opened", "closed"),
    [
        (Expanding, ["net"], []),
        (GoingThrough, [], None),
        (Computing, ["train"], []),
        (HandingOn, ["pattern"], []),
    ],
)
def test_what_cannot_be_followed_is_open(kind: type, opened: list[str], closed: list[str] | None) -> None:
    usage = usage_of(kind)
    assert usage.is_open(*opened) and (closed is None or not usage.is_open(*closed))


def test_a_class_without_source() -> None:
    made: Any = type("Made", (SRModel,), {})
    made.__module__ = "nowhere"
    exec("class Typed:\n    def __init__(self, opt):\n        opt['x']\n", namespace := {"__name__": "nowhere"})
    assert not usage_of(namespace["Typed"]).complete
    assert not usage_of(made).complete and "ema_decay" in usage_of(made).keys("train")
