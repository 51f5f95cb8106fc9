"""What only a run would meet otherwise: numbers, names and networks that no run can have, folders it cannot write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NETWORK

from esc_arch.cli import main
from esc_arch.errors import UserError
from esc_arch.options import apply_force_yml, load_yaml


@pytest.fixture
def check(work_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command says on stderr about options that it must refuse."""

    def run(options: Any, *arguments: str) -> str:
        Path("a.yml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
        capsys.readouterr()
        assert main(["check", "-opt", "a.yml", *arguments]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "number",
    ["9" * 6000, "-" + "9" * 100, "1" + ":10" * 3000, "0x" + "f" * 6000, "0" + "7" * 6000, "9_" * 30 + "9", str(2**63)],
    ids=["6,000 digits", "100 digits", "base 60", "hexadecimal", "octal", "underscores", "2**63"],
)
def test_numbers_too_large_for_anything(number: str) -> None:
    message = r"2:4: '.{,43}' cannot be read as !!int: whole numbers must be below 2\*\*63"
    with pytest.raises(UserError, match=message) as error:
        load_yaml(f"name: a\nx: {number}\n")
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="below 2"):
        apply_force_yml({}, [f"x={number}"])
    assert load_yaml(f"name: a\nx: {2**63 - 1}\n")["x"] == 2**63 - 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train:total_iter", 10**15, f"{10**15} given; must be a whole number from 1 to 1000000000"),
        ("train:total_iter", 1e100, "1e+100 given"),
        ("train:ema_decay", float("nan"), "nan given"),
        ("train:gradient_clip", float("inf"), "inf given; must be a number"),
        (
            "datasets:train:dataset_enlarge_ratio",
            1e15,
            "so that the order of an epoch takes 268,220,901 GiB",
        ),
        ("datasets:train:num_worker_per_gpu", 10**6, "1000000 given; must be a whole number from 0 to 512"),
        ("datasets:val:name", "a\nb", r"'a\nb' given; must be text on one line"),
        ("datasets:val:dataroot_gt", "a\0", r"'a\x00' given, but there is no"),
        ("val:suffix", "\x1b[2J", r"'\x1b[2J' given"),
        ("name", "a\0b", r"'a\x00b' given; must be a folder's name"),
        ("name", "a\nb", r"'a\nb' given"),
        ("name", "a\u202eb", r"'a\u202eb' given"),
        ("name", "é" * 101, "200 bytes at most"),
        ("network_g", NETWORK | {"dim": 4_000_000}, "weights and gradients alone take"),
        ("network_g", NETWORK | {"dim": 10**12}, "ESC cannot be built: Storage size calculation overflowed"),
        ("path:experiments_root", "/dev/null/x", "/dev/null/x/trial cannot be written (/dev/null/x: Not a directory)"),
        ("path:experiments_root", "x" * 300, "File name too long"),
        ("path:experiments_root", "a.yml", "a.yml: Not a directory). Change its rights, or write elsewhere"),
    ],
)
def test_values_that_no_run_can_have(key: str, value: Any, message: str, check: Any, train_options: Any) -> None:
    section = train_options
    *sections, last = key.split(":")
    for name in sections:
        section = section[name]
    section[last] = value
    err = check(train_options)
    assert f": {key}: " in err and message in err
    assert all(line.isprintable() for line in err.splitlines())


def test_keys_that_steer_a_terminal(check: Any, train_options: Any) -> None:
    train_options["a\n\x1b[2J"] = 1
    told = r"a\n\x1b[2J: the key has control characters; write it without them"
    assert check(train_options).splitlines()[0].endswith(f": {told}")


def test_folders_of_a_test_and_of_tensorboard(check: Any, train_options: Any, test_options: Any) -> None:
    Path("results").touch()
    assert "path:results_root: results/trial cannot be written" in check(test_options).replace(f"{os.getcwd()}/", "")
    Path("tb_logger").touch()
    train_options["logger"]["use_tb_logger"] = True
    assert "logger:use_tb_logger: tb_logger/trial cannot be written (tb_logger: Not a" in check(train_options)


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("train.total_iter=10", "train:total_iter=10"),
        ("name.x=1", "name:x=1"),
        ("train:optim_g.lr=1", "train:optim_g:lr=1"),
        ("datasets.train.gt_size=8", "datasets:train:gt_size=8"),
    ],
)
def test_dots_between_forced_keys(entry: str, meant: str) -> None:
    opt = {"name": "a", "train": {"optim_g": {}, "lr_factors": None}, "old.key": 1}
    with pytest.raises(UserError, match=rf"there is no key .* Write {meant}\.$"):
        apply_force_yml(opt, [entry])
    apply_force_yml(opt, ["train:lr_factors:blocks.0.*=0.1", "old.key=2"])
    assert (opt["train"]["lr_factors"], opt["old.key"]) == ({"blocks.0.*": 0.1}, 2)  # type: ignore[index]
