"""Benchmarks run and print what they promise; what they measure is not tested."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fresh import run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2}
TINY_NETWORK = [f"network_g:{key}={value}" for key, value in TINY.items()]
#: Of a training step of 16 x 16 pixels.
STEP = ["--scale", "2", "--device", "cpu", "--rounds", "1", "--force_yml", *TINY_NETWORK, "datasets:train:gt_size=32"]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/training.py, with what it sets for its process put back afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    limit = torch._dynamo.config.recompile_limit
    torch.set_num_threads(1)  # the networks are tiny
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("training")
    logging.disable(disabled)
    torch._dynamo.config.recompile_limit = limit
    torch.set_num_threads(threads)


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the only table in a text, by their first cells."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "no table, or one with broken lines"
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_training_steps_are_compared(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "peak_of_own_process", lambda *_: 3 * 2**20)  # seconds for each
    training.main(STEP)
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "x2 on cpu, batch 2, LR patches 16 x 16" in out
    assert "flex is not measured: it has no backward pass on the CPU, and `sdpa` is used instead" in out
    assert "add --compile" in out
    table = rows(out)
    assert table.pop("setting") == ["first step, s", "step, ms", "images/s", "against fp32 naive", "MiB", "loss"]
    table.pop("---")
    assert list(table) == [
        "fp32 naive", "fp32 sdpa", "+ channels_last", "+ bf16", "+ fused AdamW", "+ checkpointing",
        "fp32 auto (C++ operators)",
    ]  # fmt: skip
    assert table["fp32 naive"][3:5] == ["1.00", "3"]
    losses = [float(row[-1]) for row in table.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the same weights and images for all
    assert losses == pytest.approx([losses[0]] * len(losses), abs=0.02)
    assert losses[0] > 0.05


def test_a_setting_that_fails_leaves_the_others_their_figures(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model = training.make_model

    def fail(opt: Any, setting: Any) -> Any:
        if setting.label == "fp32 naive":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if setting.label == "+ bf16":
            raise RuntimeError("a kernel does not compile")
        return make_model(opt, setting)

    monkeypatch.setattr(training, "make_model", fail)
    monkeypatch.setattr(training, "peak_of_own_process", lambda *_: None)
    training.main(STEP)
    out, err = capsys.readouterr()
    table = rows(out)
    assert table["fp32 naive"] == ["-", "out of memory", "-", "-", "-", "-"]
    assert table["+ bf16"] == ["-", "RuntimeError, see above", "-", "-", "-", "-"]
    assert "a kernel does not compile" in err
    assert float(table["fp32 sdpa"][2]) > 0
    assert table["fp32 sdpa"][3] == "-"  # no ratio without the baseline


def test_settings_of_a_gpu(training: ModuleType) -> None:
    settings = {setting.label: setting for setting in training.settings_for("cuda", True)}
    assert list(settings) == [
        "fp32 naive", "fp32 flex", "fp32 sdpa", "+ channels_last", "+ compile", "+ bf16", "+ fused AdamW",
        "+ checkpointing", "fused AdamW, flex",
    ]  # fmt: skip
    assert settings["fp32 flex"].train == {} and settings["fp32 flex"].attention == "flex"
    assert settings["+ checkpointing"].train == {
        "channels_last": True, "compile": True, "amp": "bf16", "activation_checkpointing": True
    }  # fmt: skip
    assert settings["+ checkpointing"].optimizer == {"fused": True}


def test_memory_is_that_of_a_process_of_its_own(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run_script, PIPE=subprocess.PIPE))
    args = training.parse_arguments([*STEP, "datasets:train:gt_size=128"])
    trial = training.Trial(training.settings_for("cpu", False)[0])
    peak = training.peak_of_own_process(args, 2, trial)
    assert trial.failure is None
    if training.high_water() is not None:
        assert 2**20 < peak < 2**30


def test_loss_curves_of_two_precisions(
    photographs: Any, work_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    curves = importlib.import_module("training_curves")
    monkeypatch.setattr(curves, "subprocess", SimpleNamespace(run=run_script))
    monkeypatch.setattr(curves, "prepare_demo", lambda _: None)
    data = {
        "train:dataroot_gt": photographs.gt_lmdb,
        "train:dataroot_lq": photographs.lq_lmdb,
        "train:gt_size": 16,
        "train:num_worker_per_gpu": 0,
        "val:dataroot_gt": photographs.val_gt,
        "val:dataroot_lq": photographs.val_lq,
    }
    train, trained = curves.train, []

    def train_once(folder: Path, precision: str, args: Any) -> Any:
        """The second training is seconds long, too, and the same command but for a word."""
        trained.append(precision)
        if precision == "bf16":
            train_once.records = train(folder, precision, args)  # type: ignore[attr-defined]
            return train_once.records  # type: ignore[attr-defined]
        return [{"iter": n, "l_pix": 0.5} for n in (1, 2)] + [{"iter": 2, "dataset": "Cuts", "psnr": 20.0}]

    monkeypatch.setattr(curves, "train", train_once)
    figure = work_folder / "figures" / "curves.png"
    forced = [*TINY_NETWORK, *(f"datasets:{key}={value}" for key, value in data.items())]
    curves.main(["--device", "cpu", "--iterations", "2", "--figure", str(figure), "--force_yml", *forced])
    assert trained == ["fp32", "bf16"]
    records = train_once.records  # type: ignore[attr-defined]
    losses = [record["l_pix"] for record in records if "l_pix" in record]
    table = rows(capsys.readouterr().out)
    assert table["fp32"] == ["0.50000", "20.000"]
    assert len(losses) == 2
    assert float(table["bf16"][0]) == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert float(table["bf16"][1]) == pytest.approx(records[-1]["psnr"], abs=1e-3)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_memory_of_a_setting_is_printed_as_json(training: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--memory", "fp32 sdpa", *STEP])
    peak = json.loads(capsys.readouterr().out)
    assert peak is None or peak >= 0
