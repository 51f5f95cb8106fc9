"""The summary and the curves at the end of a training."""

from __future__ import annotations

import builtins
import math
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from esc_arch.training import report
from esc_arch.training.history import History
from esc_arch.training.report import write_report

BLUE, RED = (0x1F, 0x5A, 0x8A), (0xB5, 0x43, 0x2A)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Of 20 logged iterations, losses falling from 1 to 0.05, and two data sets."""
    made = History(tmp_path / "metrics.jsonl")
    for index in range(1, 21):
        made.append(
            {
                "iter": 100 * index, "epoch": 0, "lr": 1e-3 if index < 15 else 5e-4, "l_pix": 1 / index,
                "images_per_s": 80.0 + index, "memory_gib": min(index, 7) / 2,
            }
        )  # fmt: skip
    for index, psnr in enumerate([30.0, 33.25, 31.5, 33.25, 32.125], start=1):
        made.append({"iter": 400 * index, "dataset": "Set5", "psnr": psnr, "lpips": 1 / psnr})
        made.append({"iter": 400 * index, "dataset": "Set14", "psnr": psnr - 3})
    return made


@pytest.fixture
def opt(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "ESC_x2",
        "scale": 2,
        "network_g": {"type": "ESC"},
        "train": {"total_iter": 2e3},
        "val": {"metrics": {"psnr": {"type": "calculate_psnr"}, "lpips": {"type": "x", "better": "lower"}}},
    }


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_summary_says_what_was_done(tmp_path: Path, history: History, opt: dict[str, Any]) -> None:
    text = write_report(tmp_path, opt, history, seconds=3723.4, iterations=2000, skipped=1234, parameters=947_123)
    assert text == (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("# ESC_x2\n")
    rows = cells(text)
    final = math.fsum(1 / index for index in range(11, 21)) / 10
    for row in (
        ["network", "ESC x2, 947,123 parameters"],
        ["iterations", "2,000 of 2,000"],
        ["time of this run", "1:02:03"],
        ["images/s, median", "90.5"],
        ["peak memory", "3.50 GiB"],
        ["final l_pix", f"{final:.4e} (mean of the last 10 logged)"],
        ["skipped steps", "1,234 (their loss was not finite)"],
        ["Set5", "psnr", "32.1250", "2,000", "33.2500", "1,600", "-"],
        ["Set5", "lpips", f"{1 / 32.125:.4f}", "2,000", f"{1 / 33.25:.4f}", "1,600", "-"],
        ["Set14", "psnr", "29.1250", "2,000", "30.2500", "1,600", "-"],
    ):
        assert row in rows
    assert text.endswith(f"\n\nIn {tmp_path}.\n")
    # Also to be read as it is
    widths = {re.sub(r"[^|]", " ", line) for line in text.splitlines() if line[:1] == "|"}
    assert len(widths) == 2


def test_what_is_not_known_is_left_out(tmp_path: Path, opt: dict[str, Any]) -> None:
    history = History(tmp_path / "metrics.jsonl")
    del opt["val"], opt["scale"]
    history.append({"iter": 1, "lr": 0.1, "l_pix": None})
    text = write_report(tmp_path, opt, history, seconds=1, iterations=2000)
    assert [row[0] for row in cells(text)] == ["training", "-" * 16, "network", "iterations", "time of this run"]
    assert ["network", "ESC"] in cells(text)


def test_without_any_records_there_are_no_curves(tmp_path: Path, opt: dict[str, Any]) -> None:
    text = write_report(tmp_path, opt, History(tmp_path / "metrics.jsonl"), seconds=1, iterations=0)
    assert ["iterations", "0 of 2,000"] in cells(text)
    assert not (tmp_path / "training.png").exists()


def pixels_like(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where an RGB colour is, in a picture of OpenCV's."""
    return np.abs(picture[..., ::-1].astype(int) - colour).max(axis=2) < 12


def test_the_curves_are_drawn(tmp_path: Path, history: History, opt: dict[str, Any]) -> None:
    write_report(tmp_path, opt, history, seconds=1, iterations=2000)
    picture = cv2.imread(str(tmp_path / "training.png"))
    height, width = picture.shape[:2]
    top = 40
    rows, columns = np.linspace(top, height, 4).astype(int), (0, width // 2, width)
    for index in range(6):  # loss, learning rate, three metrics, and an empty place
        row, column = divmod(index, 2)
        part = picture[rows[row] + 20 : rows[row + 1] - 20, columns[column] : columns[column + 1]]
        assert pixels_like(part, BLUE).any() == (index < 5)
        assert pixels_like(part, RED).any() == (2 <= index < 5)
    assert not {path.name for path in tmp_path.iterdir()} - {"metrics.jsonl", "summary.md", "training.png"}


def test_pyplot_is_not_used(tmp_path: Path, history: History, opt: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    write_report(tmp_path, opt, history, seconds=1, iterations=2000)
    assert (tmp_path / "training.png").is_file()


def panels_of(history: History, opt: dict[str, Any]) -> dict[str, Any]:
    """What is drawn: axes by their titles."""
    records = history.records()
    training = [record for record in records if "dataset" not in record]
    figure = report._draw("", training, report._scores(records, opt))
    return {axes.get_title("left"): axes for axes in figure.axes}


def test_what_is_on_the_panels(history: History, opt: dict[str, Any]) -> None:
    history.append({"iter": 2100, "lr": 1e-4, "lrs": [1e-4, 2e-4], "l_pix": None, "l_gan": -1.0})
    panels = panels_of(history, opt)
    assert list(panels) == [
        "loss l_pix",
        "loss l_gan",
        "learning rate",
        "Set5: psnr",
        "Set5: lpips",
        "Set14: psnr",
    ]
    loss = panels["loss l_pix"].lines[0]
    assert list(loss.get_xdata()) == list(range(100, 2100, 100))
    assert list(loss.get_ydata()) == [1 / index for index in range(1, 21)]
    assert [title for title, axes in panels.items() if axes.get_yscale() == "log"] == ["loss l_pix"]
    psnr, best = panels["Set5: psnr"].lines
    assert list(psnr.get_xdata()) == [400, 800, 1200, 1600, 2000]
    assert list(psnr.get_ydata()) == [30.0, 33.25, 31.5, 33.25, 32.125]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([1600], [33.25])
    for title, score in (("Set5: psnr", 33.25), ("Set5: lpips", 1 / 33.25), ("Set14: psnr", 30.25)):
        assert panels[title].get_title("right") == f"best {score:.4f} at 1,600"


def test_bicubic_is_beside_the_network(tmp_path: Path, history: History, opt: dict[str, Any]) -> None:
    history.append({"iter": 2100, "dataset": "Set14", "psnr": 30.5, "bicubic": {"psnr": 28.125, "ssim": math.inf}})
    rows = cells(write_report(tmp_path, opt, history, seconds=1, iterations=2100))
    assert ["Set14", "psnr", "30.5000", "2,100", "30.5000", "2,100", "28.1250"] in rows
    assert ["Set5", "psnr", "32.1250", "2,000", "33.2500", "1,600", "-"] in rows
    panels = panels_of(history, opt)
    assert [line.get_label() for line in panels["Set14: psnr"].lines][2:] == ["bicubic 28.1250"]
    assert set(panels["Set14: psnr"].lines[2].get_ydata()) == {28.125}
    assert len(panels["Set5: psnr"].lines) == 2


def test_a_curve_of_one_point_is_a_dot(tmp_path: Path, opt: dict[str, Any]) -> None:
    history = History(tmp_path / "m")
    for index in (1, 2):
        history.append({"iter": index, "lr": 1, "l_pix": 1.0})
        assert (panels_of(history, opt)["loss l_pix"].lines[1].get_marker() == ".") == (index == 1)


@pytest.mark.parametrize(("last", "expected"), [(0.11, "linear"), (0.09, "log"), (0.0, "linear")])
def test_a_loss_over_more_than_a_decade_is_logarithmic(
    last: float, expected: str, tmp_path: Path, opt: dict[str, Any]
) -> None:
    history = History(tmp_path / "m")
    for iteration, loss in enumerate([1.0, 0.5, last]):
        history.append({"iter": iteration, "lr": 1, "l_pix": loss})
    assert panels_of(history, opt)["loss l_pix"].get_yscale() == expected


def test_smoothing() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=600) + np.linspace(0, 50, 600)
    smooth = np.array(report._smoothed(list(values)))
    windows = np.lib.stride_tricks.sliding_window_view(values, 21)
    np.testing.assert_allclose(smooth[10:-10], windows.mean(axis=1))
    assert smooth[0] == values[0] and smooth[-1] == values[-1]


def test_without_matplotlib_it_says_how_to_get_it(
    tmp_path: Path, history: History, opt: dict[str, Any], monkeypatch: Any, basicsr_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(tmp_path, opt, history, seconds=1, iterations=2000).startswith("# ESC_x2")
    (record,) = basicsr_log.records
    assert record.levelname == "INFO"
    assert 'pip install "esc-arch[plot]"' in record.getMessage()
    assert (tmp_path / "summary.md").is_file()
    assert not (tmp_path / "training.png").exists()


def test_curves_that_fail_are_a_warning(
    tmp_path: Path, history: History, opt: dict[str, Any], monkeypatch: Any, basicsr_log: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "_draw", fail)
    text = write_report(tmp_path, opt, history, seconds=1, iterations=2000)
    assert text == (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f"{tmp_path / 'training.png'} could not be written: RuntimeError: no fonts" in basicsr_log.text


def test_a_full_disk_is_a_warning_and_leaves_the_old_files(
    tmp_path: Path, history: History, opt: dict[str, Any], monkeypatch: Any, basicsr_log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "summary.md").write_text("old")
    original = builtins.open

    def fail(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wx") and str(file).startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", fail)
    assert write_report(tmp_path, opt, history, seconds=1, iterations=2000).startswith("# ESC_x2")
    assert [record.levelname for record in basicsr_log.records] == ["WARNING"] * 2
    assert "summary.md could not be written: OSError: [Errno 28]" in basicsr_log.text
    assert (tmp_path / "summary.md").read_text() == "old"


def test_a_history_of_nonsense_is_a_warning(
    tmp_path: Path, opt: dict[str, Any], basicsr_log: pytest.LogCaptureFixture
) -> None:
    history = History(tmp_path / "m")
    history.append({"iter": 1, "lr": "fast", "l_pix": "low"})
    assert write_report(tmp_path, opt, history, seconds=1, iterations=2000) == ""
    assert "summary.md could not be written: TypeError" in basicsr_log.text
