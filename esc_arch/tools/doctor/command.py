"""The command: its arguments, and its sections one after the other, each guarded."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from esc_arch.project import add_import_argument

from .context import Context
from .report import PROBLEM, Finding, Report
from .subprocess_worker import Worker
from .worker_main import describe

__all__ = ["HELP", "add_arguments", "main", "run", "run_where_the_import_failed"]

HELP = "Say what is installed, what can run here, and what is wrong with it: to be pasted into a bug report."

#: Sections by name, and what makes each: a function of this package that takes a `Context`. They are imported when
#: it is their turn, so that a fault in one is a line of the report.
SECTIONS = {
    "versions": "versions",
    "installation": "installation",
    "registered names": "registered",
    "machine": "machine",
    "GPUs": "gpus",
    "operators": "operators",
    "backends": "backends",
    "environment": "environment",
    "option file": "option_file",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file, the form of the report, and how far it goes."""
    parser.add_argument("-opt", metavar="FILE", help="option file whose data, weights and folders are looked at, too")
    add_import_argument(parser)
    parser.add_argument("--json", action="store_true", help="the report as JSON, see docs/doctor.md")
    parser.add_argument("--no-test", action="store_true", help="do not compare backends with their references")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S",
        help="seconds for each self-test and data set (60); flex and Triton kernels are compiled the first time",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be a number of seconds above 0")
    return seconds


def run(args: argparse.Namespace, import_failure: str = "") -> int:
    """Print the report; returns the exit status: 0 when nothing is a problem, 1 otherwise."""
    report = Report()
    with Worker(args.timeout) as worker:
        context = Context(args, import_failure, worker, _teller())
        for name, module in SECTIONS.items():
            context.tell(f"{name} ...")
            report.add(name, _guarded(lambda module=module: _examine(module, context)))  # type: ignore[misc]
        context.tell("")
    _print(report.as_json() if args.json else report.as_text(colours=sys.stdout.isatty()))
    return int(report.status == PROBLEM)


def main(argv: Sequence[str], import_failure: str = "") -> int:
    """`basicsr doctor` where esc_arch cannot be imported."""
    parser = argparse.ArgumentParser(prog="basicsr doctor", description=HELP)
    add_arguments(parser)
    return run(parser.parse_args(argv), import_failure)


def run_where_the_import_failed(error: Exception) -> None:
    """End a process that is `basicsr doctor` with the report, because `import esc_arch` failed with `error`.

    Does nothing in any other process.
    """
    arguments = _arguments_of_doctor(sys.argv, sys.orig_argv)
    if arguments is not None:
        from .bootstrap import replace_failed_packages

        replace_failed_packages()
        place = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(main(arguments, f"{describe(error)} ({place.filename}, line {place.lineno})"))


def _arguments_of_doctor(argv: Sequence[str], original: Sequence[str]) -> Sequence[str] | None:
    """What follows `basicsr doctor` or `python -m esc_arch doctor`; None for other commands."""
    program = argv[0].replace("\\", "/").rpartition("/")[2] if argv else ""
    starts_package = program == "-m" and "esc_arch" in original
    is_command = program in ("basicsr", "basicsr.exe", "basicsr-script.py")
    return argv[2:] if argv[1:2] == ["doctor"] and (is_command or starts_package) else None


def _examine(module: str, context: Context) -> Iterable[Finding]:
    findings: Iterable[Finding] = importlib.import_module(f"{__package__}.{module}").examine(context)
    return findings


def _guarded(work: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    """The findings of a section as far as it comes, and a problem where it fails."""
    try:
        yield from work()
    except Exception as error:
        yield Finding("section", f"could not be examined further: {describe(error)}", PROBLEM, "Report this.")


def _teller() -> Callable[[str], None]:
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    try:
        print(text)
    except UnicodeEncodeError:  # a terminal or a pipe that takes ASCII alone
        print(text.encode("ascii", "backslashreplace").decode())
