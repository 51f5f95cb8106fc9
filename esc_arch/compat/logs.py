"""Patches for `basicsr.utils.logger`: what runs log, whatever the locale, the clock and the room on the disk."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import basicsr
from basicsr.utils.dist_util import get_dist_info

from esc_arch.printing import escape_record, is_utf8, shown
from esc_arch.training.distributed import take_notes
from esc_arch.training.progress import TrainingLog, init_wandb
from esc_arch.training.run import current_run
from esc_arch.version import __version__

from .files import unused
from .patches import PATCHES, SUPPORTED_VERSION, Original, patch

_MODULE = "basicsr.utils.logger"

logger = logging.getLogger("basicsr")

_BASICSR = os.path.dirname(basicsr.__file__)
#: What BasicSR tells before a run: in several lines, or of each thing that it makes.
_DETAILS = re.compile(r"^(?!Validation ).*\n|^Number of |is (built|created)\.$")


@patch(_MODULE, "get_env_info", "a run's log lists these replacements and what was said before it")
def get_env_info(original: Original) -> str:
    notes = take_notes()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):  # the terminal has had them
            for note in notes:
                handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, "Note: %s", (note,), None))
            logger.info("Options, network and versions are in the log: %s", handler.baseFilename)
    listed = "".join(f"\n\t{module}.{name}: {fixes}" for module, name, _, fixes in PATCHES)
    return f"{original()}\nesc_arch {__version__} replaces in basicsr {SUPPORTED_VERSION}:{listed}"


@patch("basicsr.utils.options", "dict2str", "texts of option files stay on their line of the log")
def dict2str(original: Original, opt: dict[str, Any], indent_level: int = 1) -> str:
    text: str = original(
        {key: value if isinstance(value, dict) else shown(value) for key, value in opt.items()}, indent_level
    )
    return text


class RunLog(TrainingLog):
    """The log of the current run, which learns of it."""

    def __init__(self, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
        super().__init__(opt, start_iter, tb_logger)
        if (run := current_run()) is not None:
            run.begins(self, start_iter)


PATCHES.append((_MODULE, "MessageLogger", lambda _: RunLog, "a progress bar, images per second, memory, metrics.jsonl"))

# The only function of the module that is used there
_clock = SimpleNamespace(time=lambda: time.monotonic())
PATCHES.append((_MODULE, "time", lambda _: _clock, "times of a run do not depend on the system's clock"))


@patch(_MODULE, "init_wandb_logger", "current wandb, and a resumed run goes on in the same one")
def init_wandb_logger(_: Original, opt: dict[str, Any]) -> None:
    init_wandb(opt)


def _is_for_terminal(record: logging.LogRecord) -> bool:
    """False for what BasicSR tells before a run, some 250 lines, which are in the log file."""
    is_info = record.levelno == logging.INFO and record.pathname.startswith(_BASICSR)
    return not (is_info and _DETAILS.search(record.getMessage()))


@patch(_MODULE, "get_root_logger", "log files are UTF-8, overwrite none, and outlive a full disk")
def get_root_logger(
    original: Original, logger_name: str = "basicsr", log_level: int = logging.INFO, log_file: str | None = None
) -> logging.Logger:
    is_first = logger_name not in sys.modules[_MODULE].initialized_logger
    root: logging.Logger = original(logger_name, log_level)
    if log_file is not None and is_first and get_dist_info()[0] == 0:
        root.setLevel(log_level)
        root.addFilter(escape_record)
        root.handlers[-1].addFilter(_is_for_terminal)
        handler = _LogFile(unused(log_file), "w", encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(root.handlers[-1].formatter)
        handler.setLevel(log_level)
        root.addHandler(handler)
    return root


class _LogFile(logging.FileHandler):
    """A log that, when it cannot be written, says so in one line on stderr instead of a traceback for each line."""

    _told = ""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(error := sys.exc_info()[1], OSError):
            super().handleError(record)
        elif self._told != (reason := error.strerror or str(error)):
            self._told = reason
            note = f"Note: the log {self.baseFilename} cannot be written ({reason}); lines may be missing there."
            print(note, file=sys.stderr, flush=True)


@patch(_MODULE, "init_tb_logger", "a training outlives TensorBoard's file")
def init_tb_logger(original: Original, log_dir: str) -> Any:
    # TensorBoard needs a path that is UTF-8, as that from the current folder may be
    writer = original(log_dir if is_utf8(log_dir) else os.path.relpath(log_dir))
    threading.excepthook = _report_thread
    return writer if writer is None else _ForgivingWriter(writer)


def _report_thread(error: threading.ExceptHookArgs) -> None:
    """As ever, but for TensorBoard's own thread: what it cannot write is told when it is asked to write next."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(error)


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
