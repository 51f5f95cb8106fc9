"""BasicSR's own pipelines, run with checked options."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import basicsr  # noqa: F401  first: what comes with it imports modules of this package
from basicsr.utils.registry import ARCH_REGISTRY

from esc_arch import options
from esc_arch.errors import describe
from esc_arch.ops.cpu import background
from esc_arch.training.distributed import abort_all_ranks, print_note

__all__ = ["run_pipeline", "run_within"]


def run_pipeline(module: ModuleType, pipeline: Callable[[str], None], args: argparse.Namespace) -> int:
    """Run `pipeline` of basicsr's `module` with the current folder as its root; returns the exit status.

    UserError for invalid options, data or checkpoints.
    """
    with abort_all_ranks(describe):
        run_within(module, pipeline, args)
    return 0


def run_within(module: ModuleType, pipeline: Callable[[str], None], args: argparse.Namespace) -> None:
    """`run_pipeline` for a caller that is within `abort_all_ranks`, and may run several one after the other."""
    # The pipelines call this name; basicsr's function reads sys.argv and evaluates parts of it
    original: Callable[..., Any] = module.parse_options
    module.parse_options = functools.partial(_parse_options, args=args)  # type: ignore[attr-defined]
    # What parts of esc_arch that do not know BasicSR log goes to the log of the run, too
    ours, handler = logging.getLogger("esc_arch"), _IntoTheLog()
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        pipeline(os.getcwd())
    finally:
        module.parse_options = original  # type: ignore[attr-defined]
        ours.removeHandler(handler)
        ours.setLevel(level)


def _parse_options(root_path: str, is_train: bool, args: argparse.Namespace) -> tuple[Any, argparse.Namespace]:
    """The options of the run, which on a CPU begins when the C++ operators are built.

    It does not go on without them meanwhile: a run must not change its last digits on the way.
    """
    opt, args = options.parse_options(root_path, is_train, args)
    # (Several pipelines of `basicsr benchmark quality` come here, which has no such flag)
    if opt["num_gpu"] == 0 and not getattr(args, "no_build", True) and _is_ours(opt["network_g"]["type"]):
        background.build_first(print_note)
    return opt, args


def _is_ours(network: str) -> bool:
    return str(ARCH_REGISTRY.get(network).__module__).startswith("esc_arch.")


class _IntoTheLog(logging.Handler):
    """Passes lines on to the log of a run, which is BasicSR's."""

    def emit(self, record: logging.LogRecord) -> None:
        log = logging.getLogger("basicsr")
        if log.isEnabledFor(record.levelno):  # of several processes, only the first has one
            log.handle(record)
