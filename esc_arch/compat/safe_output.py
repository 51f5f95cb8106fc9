"""Replacements in basicsr 1.4.2 around what a run writes beside checkpoints: folders, logs and pictures.

Nothing that is there is overwritten, nothing depends on the clock, and a disk that is full ends no training for them.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from esc_arch.errors import UserError

from .patches import patch

__all__ = ["system_faults_named"]

logger = logging.getLogger("basicsr")


# --- faults of the system -------------------------------------------------------------------------------------------


@contextmanager
def system_faults_named() -> Iterator[None]:
    """Turn what a full disk, a folder without permission or a killed worker makes of a run into one clear message.

    Raises:
        UserError: with the file and the cure. Other errors pass.
    """
    from esc_arch.atomic_io import system_fault

    before = threading.excepthook
    threading.excepthook = functools.partial(_thread_failed, before)
    try:
        yield
    except OSError as error:
        if (message := system_fault(error)) is None:
            raise
        raise UserError(message) from error
    except RuntimeError as error:
        if not is_end_of_worker(error):
            raise
        traceback.clear_frames(error.__traceback__)  # as `main` does of what it sees
        raise UserError(worker_killed(error)) from error
    finally:
        threading.excepthook = before


def is_end_of_worker(error: Exception) -> bool:
    """Whether an error of a data loader says that a process of it is gone: in PyTorch's words, or in the system's."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | EOFError)


def worker_killed(error: Exception) -> str:
    """What to say when a process that loads data was ended from outside."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(" .")
    return (
        f"A process that loads data died ({reason}). Most often the memory was full, or the shared memory (/dev/shm): "
        f"lower datasets: train: num_worker_per_gpu or batch_size_per_gpu."
    )


def _thread_failed(before: Callable[[Any], Any], args: Any) -> None:
    """TensorBoard's thread hands its failure on, and need not print it as well."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
        before(args)


@patch("basicsr.test", "test_pipeline", "a full disk or a missing permission is one message")
def _test_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def test_pipeline(root_path: str) -> None:
        with system_faults_named():
            original(root_path)

    return test_pipeline


# --- folders --------------------------------------------------------------------------------------------------------


@patch("basicsr.utils.misc", "mkdir_and_rename", "what is archived never takes the place of an earlier archive")
def _mkdir_and_rename(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mkdir_and_rename(path: str) -> None:
        if os.path.lexists(path):
            archive = unused(f"{path}_archived_{sys.modules['basicsr.utils.misc'].get_time_str()}")
            print(f"Path already exists. Rename it to {archive}", flush=True)
            os.rename(path, archive)
        os.makedirs(path, exist_ok=True)

    return mkdir_and_rename


def unused(path: str) -> str:
    """`path`, or the first of `path_2`, `path_3`, ... (before the suffix `.log`) that is not there.

    Names made of the time can be there already: when runs begin within one second, or the clock was put back.
    """
    stem, suffix = (path[: -len(".log")], ".log") if path.endswith(".log") else (path, "")
    names = itertools.chain([path], (f"{stem}_{number}{suffix}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


@patch("basicsr.train", "copy_opt_file", "option files are UTF-8 whatever the locale")
def _copy_opt_file(original: Callable[..., Any]) -> Callable[..., Any]:
    from basicsr.utils.dist_util import master_only

    @master_only
    @functools.wraps(original)
    def copy_opt_file(opt_file: str, experiments_root: str) -> None:
        text = Path(opt_file).read_text(encoding="utf-8")
        header = f"# GENERATE TIME: {time.asctime()}\n# CMD:\n# {' '.join(sys.argv)}\n\n"
        Path(experiments_root, os.path.basename(opt_file)).write_text(header + text, encoding="utf-8")

    return copy_opt_file


# --- logs -----------------------------------------------------------------------------------------------------------


@patch("basicsr.utils.logger", "get_root_logger", "log files are UTF-8, overwrite none, and outlive a full disk")
def _get_root_logger(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_root_logger(
        logger_name: str = "basicsr", log_level: int = logging.INFO, log_file: str | None = None
    ) -> logging.Logger:
        root: logging.Logger = original(logger_name, log_level, unused(log_file) if log_file else None)
        for handler in root.handlers:
            stream = getattr(handler, "stream", None)
            if not isinstance(handler, logging.FileHandler) or isinstance(handler.handleError, _LogFault):
                continue  # reconfiguring writes what is pending, and may fail
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
                handler.handleError = _LogFault(handler)  # type: ignore[method-assign]
        return root

    return get_root_logger


class _LogFault:
    """What a log file does that cannot be written: one line on stderr, in place of a traceback for each line."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler = handler
        self._told = False

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.Handler.handleError(self._handler, record)
        elif not self._told:
            self._told = True
            file = self._handler.baseFilename
            note = f"Note: the log {file} cannot be written ({error.strerror or error}); lines may be missing there."
            print(note, file=sys.stderr, flush=True)


@patch("basicsr.utils.logger", "init_tb_logger", "a training outlives TensorBoard's file")
def _init_tb_logger(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_tb_logger(log_dir: str) -> Any:
        writer = original(log_dir)
        return writer if writer is None else _ForgivingWriter(writer)

    return init_tb_logger


class _ForgivingWriter:
    """TensorBoard's writer; when its file cannot be written, one warning, and from then on nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._failed:
                return None
            try:
                return value(*args, **kwargs)
            except OSError as error:
                self._failed = True
                logger.warning(
                    "TensorBoard's log in %s cannot be written (%s) and ends here. The run goes on.",
                    self._writer.log_dir,
                    error.strerror or error,
                )
                return None

        return call


@patch("basicsr.utils.logger", "AvgTimer", "times per iteration do not depend on the system's clock")
def _avg_timer(original: type[Any]) -> type[Any]:
    class SteadyTimer(original):
        count: int
        total_time: float

        def start(self) -> None:
            self.start_time = self.tic = time.monotonic()

        def record(self) -> None:
            self.toc = time.monotonic()
            self.current_time = self.toc - self.tic
            self.tic = self.toc
            self.count += 1
            self.total_time += self.current_time
            self.avg_time = self.total_time / self.count
            if self.count > self.window:
                self.count, self.total_time = 0, 0.0

    return SteadyTimer


# --- pictures -------------------------------------------------------------------------------------------------------


@patch("basicsr.utils.img_util", "imwrite", "pictures are written whole, and end no training when they cannot be")
def _imwrite(original: Callable[..., Any]) -> Callable[..., Any]:
    import cv2

    @functools.wraps(original)
    def imwrite(img: Any, file_path: str, params: list[int] | None = None, auto_mkdir: bool = True) -> None:
        from esc_arch.atomic_io import replacing
        from esc_arch.training.run import current_run

        path = Path(file_path)
        encoded: np.ndarray[Any, Any] = cv2.imencode(path.suffix, img, params or [])[1]
        try:
            if auto_mkdir:
                path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False) as file:
                file.write(encoded.tobytes())
        except OSError as error:
            if current_run() is None:
                raise
            logger.error("The picture %s was not written: %s. The training goes on.", path, error.strerror or error)

    return imwrite


@patch("basicsr.models.sr_model", "SRModel.nondist_validation", "images' names never lead out of the output folder")
def _nondist_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def nondist_validation(self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        original(self, _WithFitNames(dataloader), *args, **kwargs)

    return nondist_validation


class _WithFitNames:
    """A loader whose images have paths from which fit names for files follow."""

    def __init__(self, loader: Any) -> None:
        self.dataset = loader.dataset
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from esc_arch.data.names import image_name
        from esc_arch.models.metrics import image_measured

        for data in self._loader:
            names = [image_name(path) for path in data["lq_path"]]
            image_measured.set(f"{', '.join(names)} of {self.dataset.opt['name']}")
            yield {**data, "lq_path": [f"{name}.png" for name in names]}


@patch("basicsr.metrics", "calculate_metric", "a metric that cannot be computed of an image is named with it")
def _calculate_metric(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def calculate_metric(data: dict[str, Any], opt: dict[str, Any]) -> Any:
        from esc_arch.models.metrics import measure

        return measure(original, data, opt)

    return calculate_metric
