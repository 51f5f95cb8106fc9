"""Data, weights and folders of an option file: what is wrong with them, told before a run."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
import yaml
from doctor_context import by_key, context

from esc_arch.tools.doctor import option_file
from esc_arch.tools.doctor.report import PROBLEM, WARNING, Finding
from esc_arch.tools.doctor.subprocess_worker import JobFailed


@pytest.fixture
def database(photographs: Any, tmp_path: Path) -> Path:
    """An LMDB of six images, to be damaged."""
    return Path(shutil.copytree(photographs.gt_lmdb, tmp_path / photographs.gt_lmdb.name))


@pytest.fixture
def folder(photographs: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photographs.gt, tmp_path / "images"))


def change(database: Path, *, put: dict[bytes, bytes] | None = None, drop: bytes | None = None) -> None:
    with lmdb.open(str(database), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in (put or {}).items():
            transaction.put(key, value)
        if drop is not None:
            transaction.delete(drop)


def keys(database: Path) -> list[str]:
    return [line.split(".")[0] for line in (database / "meta_info.txt").read_text().splitlines()]


def examine(folder: Path, kind: str = "lmdb") -> list[tuple[str, str, str]]:
    """Texts with their status and advice."""
    found = getattr(option_file, kind)("data", str(folder))
    assert [finding.key for finding in found] == ["data", *(f"data ({number})" for number in range(2, len(found) + 1))]
    return [(finding.text, finding.status, finding.advice) for finding in found]


def only(lines: list[tuple[str, str, str]]) -> tuple[str, str, str]:
    (line,) = lines
    return line


# --- LMDBs --------------------------------------------------------------------------------------------------------


def test_a_healthy_lmdb(database: Path) -> None:
    text, status, _ = only(examine(database))
    assert status == "ok"
    assert f"{database}: {len(keys(database))} images" in text
    assert "of 6 tried can be decoded" in text and "6 of 6" in text


def test_left_over_files_are_told(database: Path) -> None:
    database.with_name(f".{database.name}.partial").mkdir()
    _, partial = examine(database)
    assert "left from a `basicsr prepare` that was interrupted: " in partial[0] and partial[1] == WARNING


@pytest.mark.parametrize("name", ["data.mdb", "meta_info.txt"])
def test_parts_that_are_missing_or_empty(database: Path, name: str) -> None:
    for damage in ((database / name).write_bytes, lambda _: (database / name).unlink()):
        damage(b"")
        text, status, advice = only(examine(database))
        assert name in text and status == PROBLEM and "basicsr prepare" in advice


def test_a_truncated_lmdb_is_not_read(database: Path) -> None:
    data = (database / "data.mdb").read_bytes()
    (database / "data.mdb").write_bytes(data[: len(data) // 2])
    text, status, advice = only(examine(database))
    assert "cut short" in text and status == PROBLEM and "basicsr prepare" in advice


def test_keys_that_only_one_of_database_and_list_has(database: Path) -> None:
    first = keys(database)[0]
    with lmdb.open(str(database), readonly=True, lock=False) as environment, environment.begin() as transaction:
        image = bytes(transaction.get(first.encode()))
    change(database, put={b"further": image}, drop=first.encode())
    lines = {status: text for text, status, _ in examine(database)}
    assert f"1 keys of meta_info.txt are not in the database: {first}" in lines[PROBLEM]
    assert "1 images are not in meta_info.txt and never read: further" in lines[WARNING]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "is not an image that OpenCV can read (0 bytes)"),
        (b"no image at all", "is not an image that OpenCV can read (15 bytes)"),
        (
            cv2.imencode(".png", np.zeros((3, 5, 3), np.uint8))[1].tobytes(),
            "has 5x3 pixels, but 48x48 in meta_info.txt",
        ),
    ],
)
def test_images_that_are_not_what_the_list_says(database: Path, value: bytes, problem: str) -> None:
    first = keys(database)[0]
    change(database, put={first.encode(): value})
    lines = examine(database)
    assert (f"1 of those tried are damaged: {first} {problem}", PROBLEM) in [line[:2] for line in lines]
    assert "5 of 6 tried can be decoded" in lines[0][0]


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_healthy_folder(folder: Path) -> None:
    (folder / ".hidden").touch()
    assert only(examine(folder, "disk")) == (f"{folder}: 6 files, 6 of 6 tried can be decoded", "ok", "")
    assert "6 files" in only(examine(folder.parent, "disk"))[0]


@pytest.mark.usefixtures("work_folder")
@pytest.mark.parametrize(
    ("root", "what"), [("none", "does not exist"), ("file", "is no folder"), ("empty", "has no files")]
)
def test_folders_without_images(root: str, what: str) -> None:
    Path("file").touch()
    Path("empty").mkdir()
    found = examined({"datasets": {"val": {"dataroot_gt": root}}})["datasets:val:dataroot_gt"]
    assert found.text == f"{Path(root).absolute()} {what}" and found.status == PROBLEM
    assert ("Relative paths" in found.advice) == (root != "empty")


def test_files_that_are_empty_or_no_images(folder: Path) -> None:
    first, second, *_ = sorted(folder.iterdir())
    first.write_bytes(b"")
    second.write_text("<html>")
    counted, empty, bad = examine(folder, "disk")
    assert "6 files, 4 of 6 tried can be decoded" in counted[0]
    assert empty[:2] == (f"1 files are empty: {first}", PROBLEM)
    unreadable = "is not an image that OpenCV can read"
    problems = f"{first.name} {unreadable} (0 bytes), {second.name} {unreadable} (6 bytes)"
    assert bad[:2] == (f"2 of those tried are damaged: {problems}", PROBLEM)


# --- weights ------------------------------------------------------------------------------------------------------


def weights(path: Path, key: str = "pretrain_network_g", param_key: str | None = None) -> Finding:
    return option_file.weights(f"path:{key}", str(path), param_key)[-1]


def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"params": {"a": torch.ones(2, 3), "b": torch.ones(4)}}, path)
    assert weights(path, param_key="params")[1:4] == (f"{path}: 2 tensors under params, 10 numbers", "ok", "")
    torch.save({"a": torch.tensor([1.0, torch.nan])}, path)
    found = weights(path)
    assert found.text == "1 tensors have numbers that are not finite: a"
    assert found.status == WARNING
    path.write_text("<!doctype html>")
    assert "is a web page" in weights(path).text and weights(path).status == PROBLEM


def test_a_training_state(tmp_path: Path) -> None:
    path = tmp_path / "4.state"
    torch.save({"epoch": 1, "iter": 4, "optimizers": []}, path)
    assert weights(path, "resume_state")[1:3] == (f"{path}: epoch 1, iteration 4", "ok")


# --- the section --------------------------------------------------------------------------------------------------


def examined(opt: dict[str, Any], **answers: Any) -> dict[str, Any]:
    Path("trial.yml").write_text(yaml.safe_dump(opt))
    return by_key(option_file.examine(context(opt="trial.yml", **answers)))


def test_without_an_option_file() -> None:
    (finding,) = option_file.examine(context())
    assert "none given" in finding.text and finding.status == "ok"


@pytest.mark.usefixtures("work_folder")
def test_everything_in_order(train_options: Any, photographs: Any) -> None:
    # (This process may have the ones of all tests open, which the doctor's own never has)
    gt, lq = (str(shutil.copytree(path, path.name)) for path in (photographs.gt_lmdb, photographs.lq_lmdb))
    train_options["datasets"]["train"] |= {"dataroot_gt": [gt], "io_backend": {"type": "lmdb"}, "dataroot_lq": lq}
    found = examined(train_options)
    assert found["datasets:train:dataroot_gt[0]"].status == found["datasets:val:dataroot_lq"].status == "ok"
    assert "images" in found["datasets:train:dataroot_lq"].text
    assert PROBLEM not in {finding.status for finding in found.values()}
    assert "same name" not in found


@pytest.mark.usefixtures("work_folder")
def test_an_option_file_that_cannot_be_read() -> None:
    Path("trial.yml").write_text("a: [\n")
    failure = JobFailed("UserError: option file trial.yml, line 2: it is wrong")
    (finding,) = option_file.examine(context(opt="trial.yml", load_yaml=failure))
    assert finding.text == "option file trial.yml, line 2: it is wrong" and finding.status == PROBLEM


@pytest.mark.usefixtures("work_folder")
def test_an_experiment_that_would_be_put_aside(train_options: Any, test_options: Any) -> None:
    Path("experiments/trial/training_states").mkdir(parents=True)
    Path("results/trial").mkdir(parents=True)
    told = examined(train_options)["same name"]
    assert "`basicsr train` will rename it to trial_archived_TIME" in told.text and told.status == WARNING
    assert "--auto_resume" not in told.text
    Path("experiments/trial/training_states/4.state").touch()
    assert "with --auto_resume it continues there instead" in examined(train_options)["same name"].text
    assert "`basicsr test` will rename it" in examined(test_options)["same name"].text


@pytest.mark.usefixtures("work_folder")
def test_weights_are_read_where_they_are_named(train_options: Any) -> None:
    torch.save({"params": {"a": torch.ones(3)}}, "net.pth")
    train_options["path"] |= {"pretrain_network_g": "net.pth", "resume_state": "none.state"}
    found = examined(train_options)
    assert found["path:pretrain_network_g"].text == "net.pth: 1 tensors under params, 3 numbers"
    assert found["path:resume_state"].text.startswith("The checkpoint none.state ")
    assert found["path:resume_state"].status == PROBLEM


@pytest.mark.usefixtures("work_folder")
def test_reading_data_crashes(train_options: Any) -> None:
    failure = JobFailed("the process ended with signal SIGBUS")
    gt = examined(train_options, disk=failure)["datasets:train:dataroot_gt"]
    assert gt.text == str(failure) and "copy it again" in gt.advice and gt.status == PROBLEM


@pytest.mark.usefixtures("work_folder")
@pytest.mark.parametrize(("free", "status"), [(2**30, WARNING), (2**20, PROBLEM), (2**40, "ok")])
def test_room_on_the_disk(train_options: Any, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(option_file.shutil, "disk_usage", lambda _: usage(2**41, 0, free))
    assert examined(train_options)["experiments_root"].status == status


@pytest.mark.usefixtures("work_folder")
def test_a_folder_that_cannot_be_written(train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_file.os, "access", lambda path, mode: False)
    room = examined(train_options | {"path": {"experiments_root": "elsewhere"}})["experiments_root"]
    assert "elsewhere" in room.text and "cannot be written" in room.text and room.status == PROBLEM
