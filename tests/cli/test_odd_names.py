"""Names of bytes that are no UTF-8, and with newlines: every verb takes them, or says so, and prints them on a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from esc_arch import ESC
from esc_arch.cli import main
from esc_arch.data.image_files import encode_png
from esc_arch.data.lmdb_check import contents_of, listed_sizes, lmdb_problem
from esc_arch.data.photographs import read_photograph

ODD = os.fsdecode(b"f\xff\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_lmdbs(folder: Path, capsys: Any) -> None:
    Path(ODD).mkdir()
    Path(ODD, "a.png").write_bytes(encode_png(read_photograph("astronaut")[:48, :48]))
    arguments = ["prepare", "train", "-i", ODD, "-o", "out", "--name", ODD, "--scales", "2", "--crop-size", "48"]
    for _ in range(2):
        assert main([*arguments, "--overlap", "24"]) == 0
        out = capsys.readouterr().out
    assert out.count("\n") == out.replace("\\n", "").count("\n") and out.count("f\\udcff\\n") >= 4
    made = Path("out", f"{ODD}_HR_sub.lmdb").absolute()
    assert lmdb_problem(made) is None and contents_of(made, listed_sizes(made), 1).bad == {}


def test_option_files(capsys: Any) -> None:
    Path(ODD.replace("\n", "")).write_text("name: a\n")
    assert main(["check", "-opt", ODD.replace("\n", "")]) == 2
    assert "f\\udcff: " in capsys.readouterr().err


def test_publishing_and_exporting(capsys: Any) -> None:
    net = ESC(dim=8, pdim=4, kernel_size=3, n_blocks=1, conv_blocks=1, window_size=4, num_heads=2, upscaling_factor=2)
    torch.save({"params": net.state_dict()}, f"{ODD}.pth")
    publish = ["publish", "-m", f"{ODD}.pth", "--license", "MIT", "--tags", "photo", "--dataset", "x", "--no-onnx"]
    assert main([*publish, "-o", ODD, "--name", "N", "--author", "J", "--description", "d"]) == 0
    assert "Wrote folder f\\udcff\\n/" in capsys.readouterr().out
    assert main([*publish, "-o", "x", "--name", "N", "--author", "J", "--description", "\udcff"]) == 2
    assert "UTF-8 (given: ['\\udcff'])" in capsys.readouterr().err
    assert main(["export", "-m", f"{ODD}.pth", "-o", f"{ODD}.pt2", "--no-check", "--size", "8x8", "--batch", "1"]) == 0
    assert "Wrote f\\udcff\\n.pt2" in capsys.readouterr().out
