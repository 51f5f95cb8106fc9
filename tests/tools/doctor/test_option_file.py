"""What an option file names: what `basicsr check` finds, and folders to write to, told before a run."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from doctor_context import by_key, context

from esc_arch.cli import main
from esc_arch.tools.doctor import option_file
from esc_arch.tools.doctor.report import PROBLEM, WARNING, Finding
from esc_arch.tools.doctor.subprocess_worker import JobFailed

pytestmark = pytest.mark.usefixtures("work_folder")


@pytest.fixture(autouse=True)
def check_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/cli/test_doctor.py has one that is started."""
    start = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if "check" not in command:  # what the check itself starts
            return start(command, **options)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = main(command[command.index("check") :])
        return subprocess.CompletedProcess(command, status, printed.getvalue().encode(), b"")

    monkeypatch.setattr(option_file.subprocess, "run", run)


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
    train_options["datasets"]["train"] |= {
        "dataroot_gt": "gt.lmdb", "dataroot_lq": str(photographs.lq_lmdb), "io_backend": {"type": "lmdb"}
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
    failure = JobFailed("UserError: option file trial.yml, line 2: it is wrong")
    (finding,) = option_file.examine(context(opt="trial.yml", load_yaml=failure))
    assert finding.text == "option file trial.yml, line 2: it is wrong" and finding.status == PROBLEM


def test_without_the_import_the_folders_are_looked_at(train_options: Any) -> None:
    found = examined(train_options, "ImportError: x")
    assert found["basicsr check"].status == WARNING and "not known" in found["basicsr check"].text
    assert found["experiments_root"].status == "ok"


def test_a_check_that_crashes_or_hangs(train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -7, b"", b"the disk is gone\n")
    monkeypatch.setattr(option_file.subprocess, "run", lambda *_, **__: done)
    found = examined(train_options)["basicsr check"]
    assert (found.text, found.status) == ("the process ended with signal SIGBUS (the disk is gone)", PROBLEM)

    def hang(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(option_file.subprocess, "run", hang)
    found = examined(train_options)["basicsr check"]
    assert found.text == "not finished after 60 s of running" and "--timeout" in found.advice


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
