"""What an option file names: what `basicsr check` finds, and folders to write to, told before a run."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from doctor_context import by_key, context

from esc_arch.tools.doctor import option_file
from esc_arch.tools.doctor.report import PROBLEM, WARNING, Finding
from esc_arch.tools.doctor.subprocess_worker import JobFailed

pytestmark = pytest.mark.usefixtures("work_folder")


def examined(opt: dict[str, Any], import_failure: str = "") -> dict[str, Finding]:
    Path("trial.yml").write_text(yaml.safe_dump(opt))
    return by_key(option_file.examine(context(import_failure, opt="trial.yml")))


def test_without_an_option_file() -> None:
    (finding,) = option_file.examine(context())
    assert "none given" in finding.text and finding.status == "ok"


def test_everything_in_order(train_options: Any) -> None:
    found = examined(train_options)
    assert found["basicsr check"].text == "ready for basicsr train"
    assert found["datasets:val"].text == "2 pairs, all sizes match scale 2"
    assert {finding.status for finding in found.values()} == {"ok"}
    assert "same name" not in found


def test_what_the_check_finds(train_options: Any, photographs: Any) -> None:
    """Keys are unique, though one has several problems; what is damaged is read without harm."""
    broken = Path(shutil.copytree(photographs.gt_lmdb, "gt.lmdb"))
    data = (broken / "data.mdb").read_bytes()
    (broken / "data.mdb").write_bytes(data[: len(data) // 2])
    shutil.copytree(photographs.lq_lmdb, "lq.lmdb")
    train_options["datasets"]["train"] |= {
        "dataroot_gt": "gt.lmdb", "dataroot_lq": "lq.lmdb", "io_backend": {"type": "lmdb"}
    }  # fmt: skip
    folder = Path(shutil.copytree(photographs.val_gt, "val"))
    for image in folder.iterdir():
        image.write_text("<html>")
    train_options["datasets"]["val"]["dataroot_gt"] = "val"
    train_options["path"]["pretrain_network_g"] = "none.pth"
    train_options["typo"] = 1
    found = examined(train_options)
    assert "cut short" in found["datasets:train:dataroot_gt"].text
    assert found["datasets:val"].text.endswith("cannot be read as an image; replace or remove it")
    assert found["datasets:val (2)"].status == PROBLEM
    assert found["path:pretrain_network_g"].text.endswith(f"there is no file {Path('none.pth').absolute()}")
    assert found["typo"].status == WARNING and found["typo"].text.startswith("line ")
    assert "basicsr check" not in found


def test_an_option_file_that_cannot_be_read() -> None:
    Path("trial.yml").write_text("a: [\n")
    found = by_key(option_file.examine(context(opt="trial.yml")))["basicsr check"]
    assert found.text.startswith("option file trial.yml:2:1: ") and found.status == PROBLEM


def test_what_cannot_be_known(train_options: Any) -> None:
    (found,) = examined(train_options, "ImportError: x").values()
    assert found.status == WARNING and "not known" in found.text
    crash = JobFailed("the process ended with signal SIGBUS")
    found = by_key(option_file.examine(context(opt="trial.yml", check=crash)))["basicsr check"]
    assert (found.text, found.status) == ("the process ended with signal SIGBUS", PROBLEM)


def test_an_experiment_that_would_be_put_aside(train_options: Any, test_options: Any) -> None:
    Path("experiments/trial/training_states").mkdir(parents=True)
    Path("results/trial").mkdir(parents=True)
    told = examined(train_options)["same name"]
    assert "`basicsr train` will rename it to trial_archived_TIME" in told.text and told.status == WARNING
    assert "--auto_resume" not in told.text
    Path("experiments/trial/training_states/4.state").touch()
    assert "with --auto_resume it continues there instead" in examined(train_options)["same name"].text
    assert "`basicsr test` will rename it" in examined(test_options)["same name"].text


@pytest.mark.parametrize(("free", "status"), [(2**30, WARNING), (2**20, PROBLEM), (2**40, "ok")])
def test_room_on_the_disk(train_options: Any, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(option_file.shutil, "disk_usage", lambda _: usage(2**41, 0, free))
    room = examined(train_options)["experiments_root"]
    assert room.status == status and bool(room.advice) == (status != "ok")


def test_a_folder_that_cannot_be_written(train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_file.os, "access", lambda path, mode: False)
    room = examined(train_options | {"path": {"experiments_root": "elsewhere"}})["experiments_root"]
    assert "elsewhere" in room.text and "cannot be written" in room.text and room.status == PROBLEM
