"""Shared by all tests. esc_arch comes first: it makes basicsr importable."""

from __future__ import annotations

import esc_arch  # isort: skip

import copy
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import basicsr.test
import basicsr.train
import basicsr.utils.misc
import cv2
import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.utils import logger as basicsr_logger

from esc_arch.cli import main
from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import folder_sources
from esc_arch.data.prepare import prepare_train
from esc_arch.ops import cpu as operators
from esc_arch.training import report

Options = dict[str, Any]

# Tests that run side by side, and what they start, would each wait for threads that have no core
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A shell that starts tests in the background has them, and so all that they start, ignore this signal
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nor do they build the C++ operators unasked, in the empty caches of some of them
os.environ.setdefault("ESC_ARCH_NATIVE", "built")

SCALE = 2
NETWORK = {
    "type": "ESC",
    "dim": 8,
    "pdim": 4,
    "kernel_size": 3,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": SCALE,
    "exp_ratio": 1.25,
}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the C++ operators before processes test side by side.

    Operators that one of them compiles between two runs of another's test would change last digits of the second.
    """
    config = session.config
    several = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if several and operators.unsupported_reasons() == [operators.NOT_BUILT]:
        operators.build()


@dataclass(frozen=True)
class Photographs:
    """Pairs for training in folders and LMDBs, and for validation in folders; LR files end in x2."""

    gt: Path
    lq: Path
    gt_lmdb: Path
    lq_lmdb: Path
    val_gt: Path
    val_lq: Path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Small cuts of a photograph; one of the two for validation is no multiple of the window."""
    from skimage.data import astronaut

    root = tmp_path_factory.mktemp("photographs")
    image = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2BGR)
    sizes = {"train": [(48, 48)] * 6, "val": [(48, 32), (42, 54)]}
    folders = {}
    for kind, of_kind in sizes.items():
        source = root / f"{kind}_source"
        source.mkdir()
        for index, (height, width) in enumerate(of_kind):
            top, left = 60 * index, 100 + 60 * index
            cv2.imwrite(str(source / f"{kind}{index}.png"), image[top : top + height, left : left + width])
        folders[kind] = prepare_benchmark(folder_sources(source), root / kind, scales=[SCALE])
    lmdbs = prepare_train(
        folder_sources(root / "train_source"), root, "train", scales=[SCALE], crop_size=48, overlap=24
    )
    train, val = folders["train"], folders["val"]
    return Photographs(train[1], train[SCALE], lmdbs[1], lmdbs[SCALE], val[1], val[SCALE])


@pytest.fixture(autouse=True)
def children_as_before() -> Iterator[None]:
    """`main` keeps the processes that it starts from the current folder; what a test starts itself may need its own."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def val_set(photographs: Photographs) -> Options:
    return {
        "name": "Cuts",
        "type": "PairedImageDataset",
        "dataroot_gt": str(photographs.val_gt),
        "dataroot_lq": str(photographs.val_lq),
        "filename_tmpl": "{}x2",
        "io_backend": {"type": "disk"},
    }


@pytest.fixture
def train_options(photographs: Photographs, val_set: Options) -> Options:
    """An option file's content: four iterations of a tiny ESC, from folders, on the CPU. To be changed freely."""
    return {
        "name": "trial",
        "model_type": "ESCModel",
        "scale": SCALE,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "Train",
                "type": "PairedImageDataset",
                "dataroot_gt": str(photographs.gt),
                "dataroot_lq": str(photographs.lq),
                "filename_tmpl": "{}x2",
                "io_backend": {"type": "disk"},
                "gt_size": 16,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 2,
            },
            "val": val_set,
        },
        "network_g": dict(NETWORK),
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.5,
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5},
            "total_iter": 4,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 2,
            "save_img": False,
            "metrics": {
                name: {"type": f"calculate_{name}", "crop_border": SCALE, "test_y_channel": True}
                for name in ("psnr", "ssim")
            },
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 2, "use_tb_logger": False},
    }


@pytest.fixture
def test_options(train_options: Options) -> Options:
    """The same for `basicsr test`."""
    opt = copy.deepcopy(train_options)
    del opt["train"], opt["logger"]
    opt["datasets"] = {"test_1": opt["datasets"]["val"]}
    opt["val"] = {"save_img": True, "suffix": None, "metrics": opt["val"]["metrics"]}
    return opt


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Run:
    """What a command left: its exit status, and what it printed."""

    status: int
    out: str
    err: str
    folder: Path

    def experiment(self, name: str = "trial") -> Path:
        return self.folder / "experiments" / name

    def log(self, name: str = "trial", *, of: str = "experiments") -> str:
        """The newest log file of a run."""
        return max((self.folder / of / name).glob("*.log")).read_text(encoding="utf-8")

    def weights(self, label: int | str = "latest", key: str = "params", name: str = "trial") -> dict[str, Any]:
        """What a checkpoint of the run holds."""
        path = self.experiment(name) / "models" / f"net_g_{label}.pth"
        return torch.load(path, weights_only=True)[key]


@dataclass
class Basicsr:
    """Runs `basicsr VERB -opt ... ARGUMENTS` in the current folder."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, verb: str, options: Options | str, *arguments: str) -> Run:
        """In this process."""
        argv = [verb, "-opt", self.option_file(options), *arguments]
        self.capture.readouterr()
        with _fresh_basicsr_logger():
            status = main(argv)
        return Run(status, *self.capture.readouterr(), self.folder)

    def in_new_process(
        self, verb: str, options: Options | str, *arguments: str, start: tuple[str, ...] = (), **environment: str
    ) -> Run:
        """As `python START -m esc_arch VERB -opt ... ARGUMENTS`."""
        command = [sys.executable, *start, "-m", "esc_arch", verb, "-opt", self.option_file(options), *arguments]
        return run_command(command, self.folder, **environment)

    def option_file(self, options: Options | str) -> str:
        """Write options as YAML, under their name; a path stays."""
        if isinstance(options, str):
            return options
        path = self.folder / f"{options['name']}.yml"
        path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path.name


def empty_figure(*_: object) -> Any:
    """Stands in for `report._draw`: drawing real curves takes longer than these trainings (see test_report.py)."""
    from matplotlib.figure import Figure

    return Figure((1, 1))


@pytest.fixture
def run_basicsr(
    work_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Basicsr]:
    # Logs and archived folders are named by the second, and runs of a test follow each other faster
    numbers = itertools.count()
    for module in (basicsr.train, basicsr.test, basicsr.utils.misc):
        monkeypatch.setattr(module, "get_time_str", lambda: f"20260101_{next(numbers):06}")
    monkeypatch.setattr(report, "_draw", empty_figure)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    yield Basicsr(work_folder, capsys)
    torch.set_num_threads(threads)


def child_environment() -> dict[str, str]:
    """This process's, with what Python and torch take from it under control."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    # esc_arch may be importable only because the tests are started from its folder
    inherited["PYTHONPATH"] = str(Path(esc_arch.__file__).parents[1])
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run_command(command: list[str], folder: Path, **environment: str) -> Run:
    """Run a command to its end."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=child_environment() | environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="session")
def start_script() -> Callable[..., Run]:
    """Runs Python code as a script of its own in a folder, with folders to be searched first for modules."""

    def start(code: str, folder: Path, *, path: tuple[Path, ...] = (), **environment: str) -> Run:
        script = folder / "script.py"
        script.write_text(code, encoding="utf-8")
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, [*path, Path(esc_arch.__file__).parents[1]]))
        return run_command([sys.executable, str(script)], folder, **environment)

    return start


@pytest.fixture
def run_script(start_script: Callable[..., Run], work_folder: Path) -> Callable[..., Run]:
    """The same, in the empty current folder."""
    return lambda code, **more: start_script(code, work_folder, **more)


class _fresh_basicsr_logger:
    """BasicSR opens its log once per process; this lets every run have its own."""

    def __enter__(self) -> None:
        self._reset()

    def __exit__(self, *_: object) -> None:
        self._reset()

    def _reset(self) -> None:
        root = logging.getLogger("basicsr")
        for handler in list(root.handlers):
            if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
                root.removeHandler(handler)
                handler.close()
        root.propagate = True
        root.setLevel(logging.NOTSET)
        basicsr_logger.initialized_logger.clear()


@pytest.fixture
def basicsr_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """BasicSR's log of a test that runs no command."""
    with _fresh_basicsr_logger(), caplog.at_level(logging.INFO, logger="basicsr"):
        basicsr_logger.initialized_logger["basicsr"] = True  # or its first use would end the propagation
        yield caplog


@pytest.fixture
def make_model(train_options: Options, tmp_path: Path, basicsr_log: object) -> Callable[..., Any]:
    """Builds a model as training does; `changes` replace top-level options, those of `path` are added."""
    folders = {"experiments_root": "", "models": "models", "training_states": "states", "visualization": "pictures"}

    def make(path: Options | None = None, **changes: Any) -> Any:
        opt = copy.deepcopy(train_options) | changes
        opt |= {"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1, "is_train": True}
        opt["path"] = {key: str(tmp_path / folder) for key, folder in folders.items()} | (path or {})
        for folder in folders.values():
            (tmp_path / folder).mkdir(exist_ok=True)
        return build_model(opt)

    return make


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def take_snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    return snapshot


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """`esc_arch.ops.cpu` with its operators built and loaded; skips with the reason where no compiler is."""
    reasons = operators.unsupported_reasons()
    if reasons not in ([], [operators.NOT_BUILT]):
        pytest.skip("; ".join(reasons))
    operators.build()
    return operators
