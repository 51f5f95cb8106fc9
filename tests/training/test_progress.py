"""What is seen of a training: lines, bar, TensorBoard, history, wandb."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import basicsr.utils.logger as basicsr_logger
import numpy as np
import pytest
import torch

from esc_arch.errors import UserError
from esc_arch.training.history import History
from esc_arch.training.progress import TrainingLog, images_per_iteration, init_wandb, peak_memory

OriginalLog = getattr(basicsr_logger.MessageLogger, "_esc_arch_original", basicsr_logger.MessageLogger)
TOTAL = 20
LINE = re.compile(r"\[images/s: (\d+\.\d), memory: (\d+\.\d\d) GiB\] $")


def options(**changes: Any) -> dict[str, Any]:
    return {
        "name": "trial_of_mine",
        "num_gpu": 0,
        "dist": False,
        "world_size": 1,
        "datasets": {"train": {"batch_size_per_gpu": 4}},
        "train": {"total_iter": float(TOTAL)},
        "logger": {"print_freq": 2, "use_tb_logger": True},
    } | changes


def variables(iteration: int = 10, **changes: Any) -> dict[str, Any]:
    """What BasicSR's loop hands to its log."""
    return {
        "epoch": 3, "iter": iteration, "lrs": [5e-4], "time": 0.5, "data_time": 0.125, "l_pix": 0.25, "out_d": 0.75,
    } | changes  # fmt: skip


class Scalars:
    """TensorBoard's writer, as far as it is used."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, iteration: int) -> None:
        self.written.append((tag, value, iteration))


def logging_to(file: Path, scalars: Scalars, **changes: Any) -> Any:
    """A log with a history and TensorBoard."""
    log = TrainingLog(options(**changes), 1, scalars)
    log.history = History(file)
    return log


# --- lines ----------------------------------------------------------------------------------------------------------


def test_the_line_is_basicsr_s_with_more_at_its_end(
    basicsr_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    OriginalLog(options(), 1, Scalars())(variables())
    TrainingLog(options(), 1, Scalars())(variables())
    theirs, ours = (record.getMessage() for record in basicsr_log.records)
    assert theirs.endswith("l_pix: 2.5000e-01 out_d: 7.5000e-01 ")
    assert ours.startswith(theirs)
    found = LINE.fullmatch(ours[len(theirs) :])
    assert found is not None
    assert found[1] == "8.0"
    assert float(found[2]) == pytest.approx(peak_memory(False) / 2**30, abs=0.05)


def test_without_a_time_there_is_no_speed(basicsr_log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    given = variables()
    del given["time"], given["data_time"]
    scalars = Scalars()
    log = logging_to(tmp_path / "m", scalars)
    log(given)
    assert re.search(r"l_pix: 2.5000e-01 out_d: 7.5000e-01 \[memory: \S+ GiB\] $", basicsr_log.messages[0])
    assert "images_per_s" not in log.history.records()[0]
    assert [tag for tag, *_ in scalars.written] == ["losses/l_pix", "out_d", "lr"]


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is Linux's")
def test_peak_memory_is_of_the_process() -> None:
    before, status = peak_memory(False), Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024
    block = np.ones(before - resident + (256 << 20), np.uint8)
    assert 200 << 20 < peak_memory(False) - before < 300 << 20
    del block


def test_memory_of_the_gpu_where_one_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 29)
    for num_gpu, expected in ((1, True), (0, False)):
        log = logging_to(tmp_path / str(num_gpu), Scalars(), num_gpu=num_gpu)
        log(variables())
        assert (log.history.records()[0]["memory_gib"] == 1.5) is expected


@pytest.mark.parametrize(
    ("dist", "num_gpu", "world_size", "expected"), [(False, 0, 1, 4), (False, 3, 1, 12), (True, 8, 6, 24)]
)
def test_images_of_an_iteration(dist: bool, num_gpu: int, world_size: int, expected: int) -> None:
    opt = options(dist=dist, num_gpu=num_gpu, world_size=world_size)
    assert images_per_iteration(opt) == expected
    if not dist:
        from basicsr.data import build_dataloader

        loader = build_dataloader(
            [0] * 50, {"phase": "train", "num_worker_per_gpu": 0, **opt["datasets"]["train"]}, num_gpu=num_gpu
        )
        assert loader.batch_size == expected


# --- TensorBoard and history ----------------------------------------------------------------------------------------


def test_tensorboard_has_basicsr_s_scalars_and_more() -> None:
    theirs, ours = Scalars(), Scalars()
    OriginalLog(options(), 1, theirs)(variables())
    TrainingLog(options(), 1, ours)(variables())
    assert ours.written == [*theirs.written, ("lr", 5e-4, 10), ("images_per_s", 8.0, 10)]


def test_learning_rates_that_differ_are_told_apart(tmp_path: Path) -> None:
    scalars = Scalars()
    log = logging_to(tmp_path / "m", scalars)
    log(variables(lrs=[1e-3, 1e-4]))
    log(variables(20, lrs=[1e-3, 1e-3]))
    rates = [entry for entry in scalars.written if entry[0].startswith("lr")]
    assert rates == [("lr/0", 1e-3, 10), ("lr/1", 1e-4, 10), ("lr", 1e-3, 20)]
    assert [(record["lr"], record.get("lrs")) for record in log.history.records()] == [
        (1e-3, [1e-3, 1e-4]),
        (1e-3, None),
    ]


@pytest.mark.parametrize("changes", [{"logger": {"print_freq": 2, "use_tb_logger": False}}, {"name": "debug_x"}])
def test_no_tensorboard_where_basicsr_has_none(changes: dict[str, Any], basicsr_log: Any) -> None:
    log = TrainingLog(options(**changes), 1, None)
    log(variables())
    assert "images/s" in basicsr_log.text


def test_the_history_has_everything(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    log = TrainingLog(options(), 1, Scalars())
    log(variables(5))
    log.history = history
    given = variables()
    log(given)
    (record,) = history.records()
    assert record.pop("memory_gib") > 0
    assert record == {
        "iter": 10, "epoch": 3, "lr": 5e-4, "images_per_s": 8.0, "time": 0.5, "data_time": 0.125, "l_pix": 0.25,
        "out_d": 0.75,
    }  # fmt: skip


def test_other_processes_say_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal, basicsr_log: pytest.LogCaptureFixture
) -> None:
    for module in ("basicsr.utils.dist_util", "esc_arch.training.progress"):
        monkeypatch.setattr(f"{module}.get_dist_info", lambda: (1, 2))
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    scalars = Scalars()
    log = logging_to(tmp_path / "m", scalars)
    log.step(1)
    log(variables())
    log.close()
    assert not scalars.written
    assert not basicsr_log.records
    assert not (tmp_path / "m").exists()
    assert terminal.text() == ""


# --- the bar --------------------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal of 120 columns, as stderr."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._received = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                got = os.read(self._master, 4096)
            except OSError:  # its other end is closed
                return
            if not got:
                return
            self._received += got

    def text(self) -> str:
        """All that came; ends the terminal."""
        self.stream.close()
        self._reader.join(timeout=20)
        return self._received.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.text()
    os.close(made._master)


@pytest.fixture
def file_log(basicsr_log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Opens BasicSR's log with a console, which becomes stderr, and a file, as a run does."""

    def start(console: Any) -> Path:
        monkeypatch.setattr(sys, "stderr", console)  # pytest has set its own since fixtures were made
        basicsr_logger.initialized_logger.clear()
        path = tmp_path / "train.log"
        basicsr_logger.get_root_logger(log_file=str(path))
        return path

    return start


def lines_on(screen: str) -> list[str]:
    """What can be read on a terminal in the end and on the way: the bar is drawn over itself."""
    return [part.strip() for line in screen.split("\n") for part in line.split("\r") if part.strip()]


def train(log: TrainingLog, start: int = 0, stop: int = TOTAL) -> None:
    """The calls of a training's loop."""
    for iteration in range(start + 1, stop + 1):
        if iteration == 1:
            log.reset_start_time()
        if iteration % 2 == 0:
            log(variables(iteration, l_pix=1 / iteration))
        if iteration == 10:
            log.logger.logger.info("Saving models and training states.")
        log.step(iteration)


def test_at_a_terminal_there_is_a_bar(terminal: Terminal, file_log: Callable[[Any], Path]) -> None:
    path = file_log(terminal.stream)
    logger = logging.getLogger("basicsr")
    logger.info("Start training.")
    log = TrainingLog(options(), 0, Scalars())
    log.step(0)
    train(log)
    log.close()
    log.close()
    log.step(TOTAL)
    logger.info("End of training.")
    screen, written = lines_on(terminal.text()), path.read_text()

    assert screen[0].endswith("INFO: Start training.")
    assert screen[-1].endswith("INFO: End of training.")
    assert sum(line.endswith("INFO: Saving models and training states.") for line in screen) == 1
    bars = [line for line in screen if re.match(r" *\d+%\|", line)]
    assert bars[0].startswith("0%|")
    assert re.fullmatch(
        r"100%\|█+\| 20/20 \[00:0\d<00:00, loss 5\.000e-02, lr 5\.00e-04, images/s: 8\.0, memory: \S+ GiB\]", bars[-1]
    )
    assert all(len(bar) <= 120 for bar in bars)
    assert not any("[epoch:" in line for line in screen)
    assert len(re.findall(r"INFO: \[trial\.\.\]\[epoch:  3, iter:", written)) == TOTAL // 2
    assert len(re.findall(r"images/s: 8\.0, memory: \S+ GiB\] $", written, re.MULTILINE)) == TOTAL // 2
    for line in ("Start training.", "Saving models and training states.", "End of training."):
        assert written.count(line) == 1
    assert "%|" not in written


def test_afterwards_everything_is_as_before(terminal: Terminal, file_log: Callable[[Any], Path]) -> None:
    file_log(terminal.stream)
    logger = logging.getLogger("basicsr")
    before = list(logger.handlers)
    log = TrainingLog(options(), 0, Scalars())
    train(log, stop=9)
    assert logger.handlers != before
    log.close()
    assert logger.handlers == before
    assert sys.stderr is terminal.stream
    log(variables(10))
    last = lines_on(terminal.text())[-1]
    assert "iter:      10" in last
    assert LINE.search(f"{last} ")


def test_a_resumed_training_s_bar_starts_where_it_was(terminal: Terminal, file_log: Callable[[Any], Path]) -> None:
    file_log(terminal.stream)
    log = TrainingLog(options(), 12, Scalars())
    log.step(12)
    log.close()
    assert lines_on(terminal.text())[0].startswith("60%|")


def test_several_losses_are_named_and_the_bar_stays_on_its_line(
    terminal: Terminal, file_log: Callable[[Any], Path]
) -> None:
    file_log(terminal.stream)
    log = TrainingLog(options(), 0, Scalars())
    log.step(1)
    log(variables(2, l_percep=2.0, l_gan=3.0, l_more=4.0))
    log.close()
    bar = lines_on(terminal.text())[-1]
    assert "l_pix 2.500e-01, l_percep 2.000e+00, l_gan 3.000e+00, lr" in bar
    assert "l_more" not in bar
    assert len(bar) <= 120


def test_without_steps_the_lines_go_to_the_terminal(terminal: Terminal, file_log: Callable[[Any], Path]) -> None:
    file_log(terminal.stream)
    log = TrainingLog(options(), 0, Scalars())
    log(variables())
    log.close()
    (line,) = lines_on(terminal.text())
    assert "iter:      10" in line


def test_elsewhere_there_are_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch, file_log: Callable[[Any], Path]) -> None:
    stderr = io.StringIO()
    path = file_log(stderr)
    log = TrainingLog(options(), 0, Scalars())
    log.step(0)
    train(log)
    log.close()
    assert stderr.getvalue() == path.read_text()
    assert len(re.findall(r"iter: +\d+, lr:\(5\.000e-04,\)\] ", stderr.getvalue())) == TOTAL // 2


def test_steps_do_not_touch_the_gpu(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, file_log: Callable[[Any], Path]
) -> None:
    file_log(terminal.stream)
    log = TrainingLog(options(), 0, Scalars())
    for name in ("synchronize", "max_memory_allocated", "is_available", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("touched"))
    for iteration in range(TOTAL + 1):
        log.step(iteration)
    log.close()


def test_no_thread_watches_the_bar(terminal: Terminal, file_log: Callable[[Any], Path]) -> None:
    file_log(terminal.stream)
    before = set(threading.enumerate())
    log = TrainingLog(options(), 0, Scalars())
    log.step(1)
    assert set(threading.enumerate()) == before
    log.close()


# --- wandb ----------------------------------------------------------------------------------------------------------


class WandbError(Exception):
    pass


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A wandb that notes how it is started."""
    runs: list[dict[str, Any]] = []
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **given: runs.append(given), Error=WandbError)
    )
    return runs


def wandb_options(folder: Path, **section: Any) -> dict[str, Any]:
    logger = {"wandb": {"project": "ESC"} | section, "use_tb_logger": True}
    return {"name": "trial", "logger": logger, "path": {"experiments_root": str(folder)}}


def test_wandb_follows_tensorboard(
    tmp_path: Path, wandb_runs: list[dict[str, Any]], basicsr_log: pytest.LogCaptureFixture
) -> None:
    opt = wandb_options(tmp_path)
    init_wandb(opt)
    (run,) = wandb_runs
    run_id = run.pop("id")
    assert re.fullmatch(r"[0-9a-f]{8}", run_id)
    assert run == {"resume": "allow", "name": "trial", "config": opt, "project": "ESC", "sync_tensorboard": True}
    assert f"project ESC, run {run_id}" in basicsr_log.text


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, wandb_runs: list[dict[str, Any]]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for folder, section in (("a", {}), ("a", {}), ("b", {}), ("a", {"resume_id": "mine"}), ("a", {"resume_id": None})):
        init_wandb(wandb_options(tmp_path / folder, **section))
    ids = [run["id"] for run in wandb_runs]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3:] == ["mine", "mine"]


def test_the_id_does_not_depend_on_the_seed(tmp_path: Path, wandb_runs: list[dict[str, Any]]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        torch.manual_seed(0)
        init_wandb(wandb_options(tmp_path / folder))
    assert wandb_runs[0]["id"] != wandb_runs[1]["id"]


def test_a_wandb_that_does_not_start_says_what_to_do(
    tmp_path: Path, wandb_runs: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise WandbError("api_key not configured (no-tty).")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match=r"wandb did not start: api_key not .* `wandb login`, set WANDB_MODE=offline"):
        init_wandb(wandb_options(tmp_path))
    assert not list(tmp_path.iterdir())


def test_other_processes_start_no_wandb(
    tmp_path: Path, wandb_runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basicsr.utils.dist_util.get_dist_info", lambda: (1, 2))
    init_wandb(wandb_options(tmp_path))
    assert not wandb_runs


def test_the_installed_wandb_takes_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_script: Callable[..., Any]
) -> None:
    place = Path(pytest.importorskip("wandb").__file__).parents[1]
    code = (
        "import esc_arch, json, wandb\nfrom torch.utils.tensorboard import SummaryWriter\n"
        "from esc_arch.training.progress import init_wandb\n"
        f"init_wandb(json.loads({json.dumps(wandb_options(tmp_path))!r}))\n"
        "with SummaryWriter('tb') as writer:\n    writer.add_scalar('losses/l_pix', 0.5, 1)\n"
        "print('run', wandb.run.id)\nwandb.finish()"
    )
    first, second = (
        start_script(code, tmp_path, path=(place,), WANDB_MODE="offline", WANDB_SILENT="true") for _ in range(2)
    )
    assert first.status == second.status == 0, first.err + second.err
    assert first.out == second.out == f"run {(tmp_path / 'wandb_id.txt').read_text()}"
