"""What is checked of the `logger:` section, and of `val:` what goes there."""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from esc_arch.options import check_options

PROJECT = {"project": "ESC", "resume_id": None}


@pytest.fixture(params=["wandb.py"])
def wandb(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """That wandb is installed; None for the parameter: it is not."""
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name != "wandb":
            return original(name, package)
        if request.param == "missing":
            return None
        return ModuleSpec(name, None, origin=request.param)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def check(opt: dict[str, Any], logger: dict[str, Any] | None, **val: Any) -> list[str]:
    opt["logger"] = logger
    opt["val"] |= val
    return list(map(str, check_options(opt, is_train=True)))


SOUND: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    ({}, {}),
    ({"print_freq": 1e2, "save_checkpoint_freq": 5e3, "use_tb_logger": False}, {"val_freq": 5e3}),
    ({"wandb": None}, {}),
    ({"wandb": {"project": None, "resume_id": "3"}}, {}),
    ({"use_tb_logger": True, "wandb": PROJECT}, {}),
    ({"use_tb_logger": True, "wandb": PROJECT | {"resume_id": "abc"}, "keep_last": 3}, {"tb_images": 2}),
    ({"keep_last": None, "of_another_model": 1}, {"tb_images": 0}),
]


@pytest.mark.parametrize(("logger", "val"), SOUND)
def test_what_passes(logger: Any, val: Any, train_options: Any, wandb: None) -> None:
    assert check(train_options, logger, **val) == []


@pytest.mark.parametrize(
    ("logger", "val", "message"),
    [
        ({"print_freq": 0}, {}, "logger:print_freq: 0 given; must be a whole number of at least 1"),
        ({"print_freq": None}, {}, "logger:print_freq: None given"),
        ({"save_checkpoint_freq": 2.5}, {}, "logger:save_checkpoint_freq: 2.5 given; must be a whole number"),
        ({}, {"val_freq": "often"}, "val:val_freq: 'often' given; must be a whole number"),
        ({"keep_last": 0}, {}, "logger:keep_last: 0 given; must be a whole number of at least 1, such as 3"),
        ({"keep_last": True}, {}, "logger:keep_last: True given"),
        ({}, {"tb_images": None}, "val:tb_images: None given; must be a whole number of at least 0"),
        ({}, {"tb_images": -1}, "val:tb_images: -1 given"),
        ({"wandb": "ESC"}, {}, "logger:wandb: 'ESC' given; must be a mapping of 'key: value' lines"),
        (
            {"use_tb_logger": True, "wandb": {"project": 7}},
            {},
            "logger:wandb:project: 7 given; must be text on one line, in quotes if it looks like a number",
        ),
        (
            {"use_tb_logger": True, "wandb": PROJECT | {"resume_id": 12}},
            {},
            "logger:wandb:resume_id: 12 given; must be text on one line, in quotes if it looks like a number",
        ),
        (
            {"wandb": PROJECT},
            {},
            "logger:wandb:project: 'ESC' given, but TensorBoard is off, and wandb takes its numbers from there. "
            "Set logger:use_tb_logger: true, or project: ~",
        ),
    ],
)
def test_what_does_not(logger: Any, val: Any, message: str, train_options: Any, wandb: None) -> None:
    (problem,) = check(train_options, logger, **val)
    assert re.match(re.escape(message), problem)


def test_pictures_need_a_model_that_makes_them(train_options: Any) -> None:
    train_options["model_type"] = "SRModel"
    (problem,) = check(train_options, {"use_tb_logger": True}, tb_images=1)
    assert problem == "val:tb_images: SRModel does not use it; ESCModel does. Change model_type, or remove it"


@pytest.mark.parametrize("wandb", ["missing", None], indirect=True)
def test_wandb_has_to_be_installed(train_options: Any, wandb: None) -> None:
    """A folder named wandb in the current one, where wandb keeps its files, is not wandb."""
    logger = {"use_tb_logger": True, "wandb": PROJECT}
    (problem,) = check(train_options, logger)
    assert problem == (
        "logger:wandb:project: 'ESC' given, but wandb is not installed. Install it with "
        'pip install "esc-arch[wandb]", or set project: ~'
    )
    train_options["name"] = "debug_trial"
    assert check(train_options, logger) == []


def test_a_test_does_not_log(test_options: Any) -> None:
    test_options |= {"logger": {"print_freq": 0, "wandb": PROJECT}}
    test_options["val"] |= {"tb_images": 3}
    assert check_options(test_options, is_train=False) == []
