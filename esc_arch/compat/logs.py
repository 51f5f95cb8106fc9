"""Patches for `basicsr.utils.logger`: what runs log, whatever the locale, the clock and the room on the disk."""

from __future__ import annotations

import functools
import io
import logging
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from esc_arch.training.distributed import take_notes
from esc_arch.training.progress import TrainingLog, init_wandb
from esc_arch.training.run import current_run
from esc_arch.version import __version__

from .files import unused
from .patches import PATCHES, SUPPORTED_VERSION, Original, patch, replace

_MODULE = "basicsr.utils.logger"

logger = logging.getLogger("basicsr")


@patch(_MODULE, "get_env_info", "a run's log lists these replacements and what was said before it")
def get_env_info(original: Original) -> str:
    notes = take_notes()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):  # the terminal has had them
            for note in notes:
                handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, "Note: %s", (note,), None))
    listed = "".join(f"\n\t{module}.{name}: {fixes}" for module, name, _, fixes in PATCHES)
    return f"{original()}\nesc_arch {__version__} replaces in basicsr {SUPPORTED_VERSION}:{listed}"


@replace(_MODULE, "MessageLogger", "a progress bar, images per second, memory, metrics.jsonl")
def message_logger(_: type[Any]) -> type[Any]:
    class RunLog(TrainingLog):
        def __init__(self, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
            super().__init__(opt, start_iter, tb_logger)
            if (run := current_run()) is not None:
                run.begins(self, start_iter)

    return RunLog


@patch(_MODULE, "init_wandb_logger", "current wandb, and a resumed run goes on in the same one")
def init_wandb_logger(_: Original, opt: dict[str, Any]) -> None:
    init_wandb(opt)


@replace(_MODULE, "time", "times of a run do not depend on the system's clock")
def monotonic_time(_: Any) -> Any:
    return SimpleNamespace(time=lambda: time.monotonic())  # the only function of it that is used


@patch(_MODULE, "get_root_logger", "log files are UTF-8, overwrite none, and outlive a full disk")
def get_root_logger(
    original: Original, logger_name: str = "basicsr", log_level: int = logging.INFO, log_file: str | None = None
) -> logging.Logger:
    root: logging.Logger = original(logger_name, log_level, unused(log_file) if log_file else None)
    for handler in root.handlers:
        is_new = isinstance(handler, logging.FileHandler) and "handleError" not in vars(handler)
        # (Once alone: reconfiguring writes what is pending, and may fail)
        if is_new and isinstance(stream := getattr(handler, "stream", None), io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            handler.handleError = _tell_once(handler)  # type: ignore[assignment]
    return root


def _tell_once(handler: Any) -> Callable[[logging.LogRecord], None]:
    """What a log file does that cannot be written: one line on stderr, instead of a traceback for each line."""

    @functools.cache
    def tell(reason: str) -> None:
        note = f"Note: the log {handler.baseFilename} cannot be written ({reason}); lines may be missing there."
        print(note, file=sys.stderr, flush=True)

    def handle_error(record: logging.LogRecord) -> None:
        if isinstance(error := sys.exc_info()[1], OSError):
            tell(error.strerror or str(error))
        else:
            logging.Handler.handleError(handler, record)

    return handle_error


@patch(_MODULE, "init_tb_logger", "a training outlives TensorBoard's file")
def init_tb_logger(original: Original, log_dir: str) -> Any:
    writer = original(log_dir)
    return writer if writer is None else _ForgivingWriter(writer)


class _ForgivingWriter:
    """TensorBoard's writer; when its file cannot be written, one warning, and from then on nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return None if self._has_failed else method(*args, **kwargs)
        except OSError as error:
            self._has_failed = True
            message = "TensorBoard's log in %s cannot be written (%s) and ends here. The run goes on."
            logger.warning(message, self._writer.log_dir, error.strerror or error)
            return None
