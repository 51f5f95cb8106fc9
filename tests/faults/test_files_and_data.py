"""Disks, folders, data and processes that fail while a training runs: what is said, what is left, how it goes on."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basicsr.train
import basicsr.utils.misc
import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader
from basicsr.utils import AvgTimer, imwrite
from basicsr.utils.logger import get_root_logger, init_tb_logger
from basicsr.utils.registry import DATASET_REGISTRY
from conftest import run_command
from ranks import enter, finish, start_forked
from torch.utils.data import Dataset

from esc_arch import ESCModel, UserError, atomic_io
from esc_arch.cli import main
from esc_arch.data import worker_pool
from esc_arch.training.progress import TrainingLog

TOTAL = 7  # of epochs of 3: 6 images in batches of 2


@pytest.fixture
def options(train_options: Any, photographs: Any, work_folder: Path) -> Any:
    """With images of their own, which can be spoiled, and states that are far apart."""
    for key in ("gt", "lq"):
        shutil.copytree(getattr(photographs, key), work_folder / key)
        train_options["datasets"]["train"][f"dataroot_{key}"] = key
        shutil.copytree(getattr(photographs, f"val_{key}"), work_folder / f"val_{key}")
        train_options["datasets"]["val"][f"dataroot_{key}"] = f"val_{key}"
    train_options["train"]["total_iter"] = TOTAL
    train_options["logger"]["save_checkpoint_freq"] = 5
    train_options["val"]["val_freq"] = 6
    return train_options


@pytest.fixture
def at_iteration(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Does something once, in the middle of an iteration."""

    def arrange(iteration: int, action: Callable[[], None]) -> None:
        step, done = ESCModel.optimize_parameters, []

        def optimize_parameters(self: Any, current_iter: int) -> None:
            step(self, current_iter)
            if current_iter == iteration and not done:
                done.append(action())

        monkeypatch.setattr(ESCModel, "optimize_parameters", optimize_parameters)

    return arrange


def assert_told(run: Any, *texts: str, status: int = 2) -> None:
    assert run.status == status, run.err
    message = run.err[run.err.index("basicsr t") :]
    for text in texts:
        assert text in message
    assert message.count("\n") == 1
    assert "Traceback" not in run.err + run.out


def resumed_equals(run_basicsr: Any, options: Any, whole: dict[str, Any]) -> None:
    run = run_basicsr("train", options, "--auto_resume")
    assert run.status == 0, run.err
    weights = run.weights()
    assert all(torch.equal(weights[name], value) for name, value in whole.items())


def whole_run(run_basicsr: Any, options: Any) -> dict[str, Any]:
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    weights = run.weights()
    shutil.rmtree(run.folder / "experiments")
    return weights


def states(run_basicsr: Any) -> list[str]:
    return sorted(path.name for path in (run_basicsr.folder / "experiments/trial/training_states").iterdir())


# --- data -----------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "disappears": (lambda path: path.unlink(), "Cannot read the image"),
    "turns corrupt": (lambda path: path.write_bytes(path.read_bytes()[:200]), "is not an image that OpenCV can read"),
    "turns empty": (lambda path: path.write_bytes(b""), "is not an image that OpenCV can read (0 bytes)"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_training_images_in_the_middle_of_an_epoch(
    damage: str, workers: int, run_basicsr: Any, options: Any, at_iteration: Any
) -> None:
    """No iteration that was done is lost, and the rest is that of a run without the fault."""
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    if workers:
        options["datasets"]["train"] |= {"persistent_workers": True, "dataset_enlarge_ratio": 10}
        options["train"]["total_iter"] = 35
        options["logger"]["save_checkpoint_freq"] = options["val"]["val_freq"] = 100
    whole = whole_run(run_basicsr, options)
    files = sorted((run_basicsr.folder / "lq").iterdir())
    kept = [path.read_bytes() for path in files]
    spoil, text = DAMAGES[damage]
    at_iteration(4, lambda: [spoil(path) for path in files])
    run = run_basicsr("train", options)
    (state,) = states(run_basicsr)
    assert_told(run, text, "lq/train", f"The last state is {run.experiment() / 'training_states' / state}: go on from")
    assert state == "4.state" or workers  # which are ahead by some batches
    for path, content in zip(files, kept, strict=True):
        path.write_bytes(content)
    resumed_equals(run_basicsr, options, whole)


def test_validation_images(run_basicsr: Any, options: Any, at_iteration: Any) -> None:
    whole = whole_run(run_basicsr, options)
    path = run_basicsr.folder / "val_lq" / "val1x2.png"
    content = path.read_bytes()
    at_iteration(6, path.unlink)
    run = run_basicsr("train", options)
    assert_told(run, "Cannot read the image val_lq/val1x2.png: No such file", "6.state: go on from it")
    assert states(run_basicsr) == ["5.state", "6.state"]
    path.write_bytes(content)
    resumed_equals(run_basicsr, options, whole)
    records = [json.loads(line) for line in (run.experiment() / "metrics.jsonl").read_text().splitlines()]
    assert [record["iter"] for record in records if "dataset" in record] == [6, 7]


class NaNDataset(Dataset[Any]):
    """Pairs of which one has a pixel that is no number, in the files that it is told."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        lq = torch.rand(3, 8, 8)
        if index == 3 and Path("spoiled").exists():
            lq[0, 0, 0] = float("nan")
        return {"lq": lq, "gt": torch.rand(3, 16, 16), "lq_path": f"{index}.png", "gt_path": f"{index}.png"}


def test_nan_in_the_data(run_basicsr: Any, options: Any) -> None:
    """What is saved is sound; with the data fixed the run goes on as if they had been so."""
    DATASET_REGISTRY._obj_map.setdefault("NaNDataset", NaNDataset)
    options["datasets"]["train"] |= {"type": "NaNDataset"}
    options["logger"]["save_checkpoint_freq"] = 1
    whole = whole_run(run_basicsr, options)
    Path("spoiled").touch()
    run = run_basicsr("train", options)
    assert_told(
        run, "Training stopped at iteration", "l_pix is nan", "look for broken images", "train: nonfinite: skip"
    )
    for path in (run.experiment() / "models").iterdir():
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["params"].values())
    Path("spoiled").unlink()
    resumed_equals(run_basicsr, options, whole)


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [None, "cpu"])
def test_a_worker_that_is_killed(prefetch: str | None, run_basicsr: Any, options: Any, at_iteration: Any) -> None:
    import multiprocessing

    options["datasets"]["train"] |= {"num_worker_per_gpu": 1, "prefetch_mode": prefetch, "dataset_enlarge_ratio": 10}
    options["logger"]["save_checkpoint_freq"] = 2
    options["train"]["total_iter"] = 30
    options["val"]["val_freq"] = 100
    whole = whole_run(run_basicsr, options)
    others = set(multiprocessing.active_children())  # of tests before

    def kill() -> None:
        (worker,) = set(multiprocessing.active_children()) - others
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    at_iteration(5, kill)
    run = run_basicsr("train", options)
    assert_told(run, "A process that loads data died (", "num_worker_per_gpu")
    assert "go on from it with --auto_resume" in run.err or "4.state" in states(run_basicsr)
    resumed_equals(run_basicsr, options, whole)


# --- disks ----------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="no file system can be mounted in a name space here")


def train_within(process: int, argv: list[str]) -> int:
    """Train where another process has mounted the disk, and copy out what it then has."""
    enter(process, "user", "mnt")
    status = main(argv)
    shutil.copytree("disk", "saved")
    return status


def on_small_disk(run_basicsr: Any, options: Any, size: str, last: str = ":") -> Any:
    """`basicsr train` where experiments/ and tb_logger/ are a file system of their own of a size, copied out after."""
    script = f"""
    mkdir -p disk && mount -t tmpfs -o size={size} none disk || exit 99
    mkdir -p experiments tb_logger disk/tb && mount --bind disk experiments && mount --bind disk/tb tb_logger || exit 99
    {last} || exit 99
    echo $$
    read _
    """
    folder, argv = run_basicsr.folder, ["train", "-opt", run_basicsr.option_file(options)]
    command = ["unshare", "-rm", "sh", "-c", script]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as mounted:
        assert mounted.stdout is not None
        process = int(mounted.stdout.readline())
        return finish(folder, [start_forked(folder, train_within, process, argv)])[0]


@needs_mount
def test_a_disk_that_is_full_while_saving(run_basicsr: Any, options: Any) -> None:
    """Real: a file system of some hundred KiB. Whole checkpoints alone are left, and the run goes on from them."""
    options["logger"] |= {"save_checkpoint_freq": 1, "use_tb_logger": True}
    options["train"]["total_iter"] = 40
    options["val"]["val_freq"] = 100
    run = on_small_disk(run_basicsr, options, "600k")
    assert run.status == 2, run.err
    assert "Traceback" not in run.err
    assert "No space left on device" in run.err
    assert "net_g_latest.pth was not saved, and the one before is untouched" in run.err.splitlines()[-1]
    saved = run.folder / "saved" / "trial"
    files = [*(saved / "models").iterdir(), *(saved / "training_states").iterdir()]
    assert len(files) > 2
    for path in files:
        torch.load(path, weights_only=True)
    shutil.rmtree(run.folder / "experiments")
    (run.folder / "saved").rename(run.folder / "experiments")
    resumed = run_basicsr("train", options, "--auto_resume")
    assert resumed.status == 0, resumed.err
    assert resumed.log().count("iter:") > 3


@needs_mount
def test_a_disk_that_is_full_from_the_start(run_basicsr: Any, options: Any) -> None:
    run = on_small_disk(run_basicsr, options, "4k")
    assert run.status == 2, run.err
    assert "Traceback" not in run.err
    assert "No space left on device" in run.err.splitlines()[-1]


@needs_mount
def test_an_output_folder_that_is_mounted_read_only(run_basicsr: Any, options: Any) -> None:
    run = on_small_disk(run_basicsr, options, "1m", last="mount -o remount,bind,ro experiments")
    assert run.status == 2, run.err
    assert "Traceback" not in run.err
    assert run.err.splitlines()[-1].endswith("Read-only file system). Change its rights, or write elsewhere")


@pytest.mark.skipif(can_mount(), reason="a disk that is full says the same")
def test_files_longer_than_allowed(run_basicsr: Any, options: Any) -> None:
    """A limit on the length of files stands for a full disk where none can be mounted."""
    options["logger"]["save_checkpoint_freq"] = 1
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
    code += "from esc_arch.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    (run_basicsr.folder / "limited.py").write_text(code)
    command = [sys.executable, "limited.py", "train", "-opt", run_basicsr.option_file(options)]
    run = run_command(command, run_basicsr.folder)
    assert run.status == 2, run.err
    assert "Traceback" not in run.err
    assert "net_g_latest.pth was not saved" in run.err.splitlines()[-1]
    assert "File too large" in run.err
    assert list((run.experiment() / "models").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 8000


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **_: Any) -> Any:
        place = next((str(each) for each in arguments if isinstance(each, str | os.PathLike)), None)
        raise OSError(number, os.strerror(number), place)

    return fail


@pytest.mark.parametrize("place", ["experiments", "tb_logger"])
def test_an_output_folder_below_a_file(place: str, run_basicsr: Any, options: Any) -> None:
    (run_basicsr.folder / place).write_text("a file")
    options["logger"]["use_tb_logger"] = True
    run = run_basicsr("train", options)
    assert run.status == 2
    assert run.err.endswith(f"{place}: Not a directory). Change its rights, or write elsewhere\n")


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EACCES, "Get the permission"), (errno.EROFS, "or use another folder"), (errno.ENOSPC, "MiB). Make room")],
)
@pytest.mark.parametrize("verb", ["train", "test"])
def test_an_output_folder_that_cannot_be_written(
    verb: str, number: int, cure: str, run_basicsr: Any, options: Any, test_options: Any, monkeypatch: Any
) -> None:
    """Root may write everywhere, so that the system is made to refuse."""
    file = run_basicsr.option_file(options if verb == "train" else test_options)
    monkeypatch.setattr(os, "makedirs", fail_with(number))
    run = run_basicsr(verb, file)
    assert_told(run, os.strerror(number), "trial", cure)


def test_an_earlier_run_that_cannot_be_put_aside(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    precious = run_basicsr.folder / "experiments" / "trial" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("weeks of work")
    run_basicsr.option_file(options)
    monkeypatch.setattr(os, "rename", fail_with(errno.EACCES))
    assert_told(run_basicsr("train", options), "experiments/trial", "Permission denied. Get the permission")
    assert precious.read_text() == "weeks of work"


def test_other_errors_keep_their_traceback(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    """A fault of the program must not look like one of the system."""
    run_basicsr.option_file(options)
    monkeypatch.setattr(basicsr.train, "build_model", fail_with(errno.ENOTTY))
    with pytest.raises(OSError):
        run_basicsr("train", options)


def test_old_checkpoints_that_cannot_be_removed(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    options["logger"] |= {"save_checkpoint_freq": 1, "keep_last": 1}
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.suffix in (".state", ".pth"):
            fail_with(errno.EACCES)(self)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    assert "1.state cannot be removed: Permission denied" in run.log()


def test_pictures_and_tables_that_cannot_be_written(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    """A training outlives them; for a test they are what it is for."""
    options["val"] |= {"save_img": True, "per_image": True, "comparison": True}
    options["logger"]["save_checkpoint_freq"] = 100
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith((".csv", ".png")) and "visualization" in str(target):
            fail_with(errno.ENOSPC)(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    assert "Cuts.csv was not written: No space left on device. The training goes on." in run.log()
    assert "val0x2_6.png was not written: No space left on device. The training goes on." in run.log()
    assert not list((run.experiment() / "visualization").rglob("*.p*"))


def test_results_that_cannot_be_written(run_basicsr: Any, test_options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(atomic_io.os, "replace", fail_with(errno.ENOSPC))
    run = run_basicsr("test", test_options)
    assert_told(run, "No space left on device", "Make room there")


def test_results_that_are_longer_than_there_is_room(run_basicsr: Any, test_options: Any, monkeypatch: Any) -> None:
    """What writing raises names no file."""

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_io.os, "fsync", write)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        atomic_io.write_atomically(run_basicsr.folder / "a.txt", b"new")
    monkeypatch.setattr("esc_arch.compat.files.cv2.imencode", lambda *_: (True, np.zeros(2**20, np.uint8)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
        run = run_basicsr("test", test_options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_told(run, "results/trial/visualization/Cuts/val0x2_trial.png: File too large (free space there: ")


def test_pictures_are_those_of_basicsr(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for name, params in (("a.png", None), ("a.jpg", [cv2.IMWRITE_JPEG_QUALITY, 80]), ("deep/er/a.bmp", None)):
        imwrite(image, str(tmp_path / name), params)
        cv2.imwrite(str(tmp_path / f"own{Path(name).suffix}"), image, params or [])
        assert (tmp_path / name).read_bytes() == (tmp_path / f"own{Path(name).suffix}").read_bytes()
    assert not list(tmp_path.rglob(".*"))


def test_a_log_that_cannot_be_written(tmp_path: Path, basicsr_log: Any, capsys: Any, monkeypatch: Any) -> None:
    """One line, in place of a traceback for each line of the log."""
    from basicsr.utils import logger as basicsr_logger

    basicsr_logger.initialized_logger.clear()
    log = get_root_logger(log_file=str(tmp_path / "a.log"))
    (handler,) = [each for each in log.handlers if isinstance(each, logging.FileHandler)]
    before = handler.setStream(open("/dev/full", "w"))  # noqa: SIM115  put back below
    log.info("one")
    log.info("two")
    monkeypatch.setattr(handler, "flush", lambda: None)
    handler.setStream(before)
    err = capsys.readouterr().err
    assert err.count("a.log cannot be written (No space left on device); lines may be missing there.") == 1
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_s_file_that_cannot_be_written(
    tmp_path: Path, basicsr_log: Any, capsys: Any, monkeypatch: Any
) -> None:
    writer = init_tb_logger(str(tmp_path / "tb"))
    writer.add_scalar("a", 1, 1)
    writer.flush()
    events = writer.file_writer.event_writer._async_writer._writer._writer
    monkeypatch.setattr(type(events), "write", fail_with(errno.ENOSPC))
    for iteration in range(200):
        writer.add_scalar("a", 1, iteration)
        time.sleep(0.001)
    writer.flush()
    writer.close()
    (warning,) = [record for record in basicsr_log.records if "TensorBoard" in record.getMessage()]
    assert f"{tmp_path / 'tb'} cannot be written (No space left on device) and ends here" in warning.getMessage()


# --- names and clocks -----------------------------------------------------------------------------------------------


def test_an_archive_of_the_same_second(run_basicsr: Any, options: Any, monkeypatch: Any, take_snapshot: Any) -> None:
    """Also when the clock was put back. Nothing is overwritten: neither folders nor logs."""
    for module in (basicsr.train, basicsr.utils.misc):
        monkeypatch.setattr(module, "get_time_str", lambda: "20260101_000000")
    options["logger"]["use_tb_logger"] = True
    options["train"]["total_iter"] = 1
    snapshots = []
    for _ in range(4):
        run = run_basicsr("train", options)
        assert run.status == 0, run.err
        snapshots.append(take_snapshot(run.experiment()))
    suffixes = ["_archived_20260101_000000", "_archived_20260101_000000_2", "_archived_20260101_000000_3"]
    for root in ("experiments", "tb_logger"):
        names = {path.name for path in (run.folder / root).iterdir()} - {".trial.lock"}
        assert names == {f"trial{end}" for end in ["", *suffixes]}
    for suffix, snapshot in zip(suffixes, snapshots, strict=False):
        assert take_snapshot(run.folder / "experiments" / f"trial{suffix}") == snapshot


def test_an_empty_folder_in_place_of_the_archive(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(basicsr.utils.misc, "get_time_str", lambda: "now")
    archive = run_basicsr.folder / "experiments" / "trial_archived_now"
    archive.mkdir(parents=True)
    (run_basicsr.folder / "experiments" / "trial").symlink_to("nowhere")
    options["train"]["total_iter"] = 1
    assert run_basicsr("train", options).status == 0
    assert not list(archive.iterdir())
    assert os.readlink(archive.with_name("trial_archived_now_2")) == "nowhere"


def test_logs_of_the_same_second(run_basicsr: Any, options: Any, at_iteration: Any, monkeypatch: Any) -> None:
    for module in (basicsr.train, basicsr.utils.misc):
        monkeypatch.setattr(module, "get_time_str", lambda: "now")
    path = run_basicsr.folder / "lq" / "train0x2.png"
    content = path.read_bytes()
    at_iteration(3, path.unlink)
    run = run_basicsr("train", options)
    first = (run.experiment() / "train_trial_now.log").read_bytes()
    path.write_bytes(content)
    assert run_basicsr("train", options, "--auto_resume").status == 0
    assert (run.experiment() / "train_trial_now.log").read_bytes() == first
    assert "Resuming" in (run.experiment() / "train_trial_now_2.log").read_text()


def test_a_clock_that_goes_back(run_basicsr: Any, options: Any, monkeypatch: Any) -> None:
    """By an hour with each look at it."""
    now = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    records = [json.loads(line) for line in (run.experiment() / "metrics.jsonl").read_text().splitlines()]
    assert [record["iter"] for record in records if "dataset" not in record] == list(range(1, TOTAL + 1))
    assert all(record.get("time", 0) >= 0 and record.get("images_per_s", 1) > 0 for record in records)
    resumed = run_basicsr("train", options, "--auto_resume", "--force_yml", "train:total_iter=9")
    assert resumed.status == 0, resumed.err
    assert f"iter: {TOTAL}." in resumed.log() and (run.experiment() / "models" / "net_g_latest.pth").is_file()


def test_durations_are_of_a_steady_clock(monkeypatch: Any) -> None:
    steady = iter([10.0, 13.0, 13.0, 18.0, 18.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(steady))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    timer = AvgTimer(window=1)
    timer.record()
    assert (timer.get_current_time(), timer.get_avg_time()) == (3.0, 3.0)
    timer.record()
    assert (timer.get_current_time(), timer.get_avg_time()) == (5.0, 4.0)
    assert timer.count == 0


def test_the_time_left_is_of_a_steady_clock(options: Any, basicsr_log: Any, monkeypatch: Any) -> None:
    steady = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: steady[0])
    now = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    opt = options | {"dist": False, "num_gpu": 0, "world_size": 1}
    opt["train"]["total_iter"] = 12
    log = TrainingLog(opt, 0)
    steady[0] += 10
    monkeypatch.setattr(time, "time", lambda: 1e9)
    log({"epoch": 0, "iter": 1, "lrs": [1e-3], "time": 1.0, "data_time": 0.0, "l_pix": 1.0})
    assert "[eta: 0:00:55, " in basicsr_log.text  # 10 s for what counts as two iterations, and eleven to come


@pytest.mark.parametrize("workers", [0, 2])
def test_too_few_open_files_for_the_workers(workers: int, monkeypatch: Any) -> None:
    """Without the limit raised they hang, and fill the disk with tracebacks."""
    raised: list[Any] = []
    monkeypatch.setattr(worker_pool.resource, "setrlimit", lambda _, limits: raised.append(limits))
    for most in (10**6, resource.RLIM_INFINITY):
        monkeypatch.setattr(worker_pool.resource, "getrlimit", lambda _, most=most: (1, most))
        build_dataloader([1, 2], {"phase": "train", "batch_size_per_gpu": 1, "num_worker_per_gpu": workers}, 0, seed=0)
        assert [limit for _, limit in raised] == [most] * bool(workers)
        raised.clear()
    monkeypatch.setattr(worker_pool.resource, "getrlimit", lambda _: (20, 20))
    with contextlib.nullcontext() if workers == 0 else pytest.raises(UserError) as refused:
        build_dataloader([1, 2], {"phase": "train", "batch_size_per_gpu": 1, "num_worker_per_gpu": workers}, 0, seed=0)
    if refused is not None:
        message = (
            r"With 2 processes about (\d+) files are open at once, and the limit is 20\. Raise it \(ulimit -n \1\)"
        )
        assert re.match(rf"{message}, or lower datasets: train: num_worker_per_gpu\.$", str(refused.value))


def test_user_errors_of_the_system_name_the_file() -> None:
    from esc_arch.compat.failures import system_faults_named

    message = r"a\.log: Too many open files\. Raise the limit of open files \(ulimit -n\)"
    with pytest.raises(UserError, match=message), system_faults_named():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.log")
    with pytest.raises(UserError, match=r"^Cannot allocate memory\. The memory is full"), system_faults_named():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    with pytest.raises(RuntimeError, match="shapes"), system_faults_named():
        raise RuntimeError("shapes")
