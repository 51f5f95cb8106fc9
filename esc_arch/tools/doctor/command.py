"""The command: its arguments, and its sections one after the other; a section that fails is a line of the report."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable

from esc_arch.project import add_import_argument

from . import installation, machine, option_file
from .report import PROBLEM, WARNING, Context, Finding, as_json, as_text
from .subprocess_worker import Worker, describe

__all__ = ["add_arguments", "run"]

SECTIONS: dict[str, Callable[[Context], Iterable[Finding]]] = {
    "versions": installation.versions,
    "installation": installation.copies,
    "registered names": installation.registered_names,
    "machine": machine.examine,
    "GPUs": machine.gpus,
    "operators": machine.operators,
    "backends": machine.backends,
    "environment": machine.environment,
    "option file": option_file.examine,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file, the form of the report, and how far it goes."""
    parser.add_argument("-opt", "--opt", metavar="FILE", help="also this option file, its data, weights and folders")
    add_import_argument(parser)
    parser.add_argument("--json", action="store_true", help="the report as JSON, see docs/doctor.md")
    parser.add_argument("--no-test", action="store_true", help="do not compare backends with their references")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S",
        help="seconds for each self-test and for the option file (60); the first time kernels are compiled",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be a number of seconds above 0")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Print the report, a section as soon as it is known; returns the exit status: 1 if there is a problem, else 0."""
    found: dict[str, list[Finding]] = {}
    with Worker(args.timeout) as worker:
        context = Context(args, installation.basicsr_failure(worker), worker)
        show = (lambda _: None) if args.json else print
        for name, section in SECTIONS.items():
            show(f"[{name}]")
            found[name] = []
            try:
                found[name].extend(section(context))
            except Exception as error:
                text = f"could not be examined further: {describe(error)}"
                found[name].append(Finding("section", text, PROBLEM, "Report this."))
            show(f"{as_text(found[name], colours=sys.stdout.isatty())}\n")
    statuses = [finding.status for findings in found.values() for finding in findings]
    counts = [(statuses.count(status), status) for status in (PROBLEM, WARNING) if status in statuses]
    told = ", ".join(f"{count} {status}{'s' * (count > 1)}" for count, status in counts) or "Nothing is wrong"
    print(as_json(found) if args.json else f"{told}.")
    return int(PROBLEM in statuses)
