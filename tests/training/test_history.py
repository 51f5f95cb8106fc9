"""The file of a training's numbers: what goes in comes out, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esc_arch.training import history as module
from esc_arch.training.history import History

TRAINING = {"iter": 100, "epoch": 0, "lr": 5e-4, "l_pix": 0.0213, "images_per_s": 80.5}
VALIDATION = {"iter": 5000, "dataset": "Set5", "psnr": 37.912345678901234, "ssim": 0.96}


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "metrics.jsonl")


def test_each_record_is_a_line_of_json(history: History) -> None:
    history.append(TRAINING)
    history.append(VALIDATION)
    assert [json.loads(line) for line in history.path.read_text().splitlines()] == [TRAINING, VALIDATION]
    assert History(str(history.path)).records() == [TRAINING, VALIDATION]


def test_before_the_first_record_there_is_none(history: History) -> None:
    assert history.records() == []
    history.truncate(0)
    assert not history.path.exists()


def test_other_libraries_numbers_are_numbers(history: History) -> None:
    history.append({"iter": np.int64(3), "lrs": (np.float32(0.5), 1e-4), "l_pix": torch.tensor(0.25), "name": "ü"})
    assert history.records() == [{"iter": 3, "lrs": [0.5, 1e-4], "l_pix": 0.25, "name": "ü"}]


def test_what_is_not_finite_is_null(history: History) -> None:
    values = {"a": math.nan, "b": math.inf, "c": np.float32("-inf"), "d": torch.tensor(math.nan), "e": [math.nan, 1.0]}
    history.append({"iter": 1, **values})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(history.path.read_text(), parse_constant=refuse)
    assert record == {"iter": 1, "a": None, "b": None, "c": None, "d": None, "e": [None, 1.0]}


def test_a_line_cut_off_is_left_out_and_the_next_is_whole(history: History) -> None:
    history.append(TRAINING)
    history.append(VALIDATION)
    whole = history.path.read_bytes()
    for cut in range(1, len(json.dumps(VALIDATION)) + 1):
        history.path.write_bytes(whole[: -cut - 1])
        assert history.records() == [TRAINING]
        history.append(VALIDATION)
        assert history.records() == [TRAINING, VALIDATION]


def test_a_line_without_only_its_end_counts(history: History) -> None:
    history.append(TRAINING)
    history.path.write_bytes(history.path.read_bytes().rstrip())
    history.append(VALIDATION)
    assert history.records() == [TRAINING, VALIDATION]


def test_lines_of_others_are_left_out(history: History) -> None:
    history.path.write_text('{"iter": 1}\n\n[1]\n{"epoch": 1}\n{"iter": "x"}\n\x00\xff\n{"iter": 2}\n', "latin-1")
    assert history.records() == [{"iter": 1}, {"iter": 2}]


def test_truncating_drops_what_is_later(history: History) -> None:
    records = [{"iter": iteration} for iteration in (1, 2, 2, 3, 4)]
    for record in records:
        history.append(record)
    before = history.path.read_bytes()
    history.truncate(4)
    assert history.path.read_bytes() == before
    history.truncate(2)
    assert history.records() == records[:3]
    assert [path.name for path in history.path.parent.iterdir()] == ["metrics.jsonl"]
    history.append({"iter": 3})
    assert history.records() == records[:4]
    history.truncate(-1)
    assert history.records() == []


def test_truncating_leaves_the_old_file_or_the_new_one(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2):
        history.append({"iter": iteration})

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        history.truncate(1)
    assert history.records() == [{"iter": 1}, {"iter": 2}]


def test_a_full_disk_is_one_warning(
    history: History, monkeypatch: pytest.MonkeyPatch, basicsr_log: pytest.LogCaptureFixture
) -> None:
    history.append({"iter": 1})
    history.append({"iter": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        patch.setattr(module, "write_atomically", fail)
        history.append({"iter": 3})
        history.append({"iter": 4})
        history.truncate(1)
    (warning,) = basicsr_log.records
    assert warning.levelno == logging.WARNING
    assert f"{history.path} cannot be read or written (No space left on device)" in warning.getMessage()
    history.append({"iter": 5})
    assert history.records() == [{"iter": 1}, {"iter": 2}, {"iter": 5}]


def test_a_file_that_cannot_be_read_has_no_records(tmp_path: Path, basicsr_log: pytest.LogCaptureFixture) -> None:
    assert History(tmp_path).records() == []
    assert "cannot be read or written (Is a directory)" in basicsr_log.text
