"""The console command `basicsr`: a verb each, a file each.

A verb's module has `run(args)`, which returns the exit status; `arguments` has the flags of all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from esc_arch import __version__
from esc_arch.atomic_io import system_fault
from esc_arch.errors import FAULT, NO_BASICSR, UNREAD, UserError, describe
from esc_arch.printing import safe_streams
from esc_arch.project import import_modules, leave_current_folder

from .arguments import add_arguments

__all__ = ["VERBS", "main"]

#: What each verb does; its module is imported when it is called.
VERBS = {
    "train": "Train a network from an option file, with BasicSR's pipeline.",
    "test": "Test a network on data sets from an option file, with BasicSR's pipeline.",
    "prepare": "Make LMDBs of sub-images for training, benchmark folders for testing, or a small demo of both.",
    "convert": (
        "Print the network_g section of a checkpoint, and convert it: .pth, .safetensors, folded, factors for tables."
    ),
    "export": "Write a checkpoint for other runtimes: ONNX, a torch.export program, an AOTInductor package.",
    "publish": (
        "Make a folder to share a network by: weights, ONNX, option files, model card, and the entry for OpenModelDB."
    ),
    "upscale": "Enlarge pictures and videos by the network of a checkpoint.",
    "benchmark": "Reproduce the paper's tables, and compare its numbers with ours.",
    "warmup": (
        "Prepare this machine: compile the C++ operators and the kernels of a network once, try the Triton kernels on "
        "this GPU, and say what can be used here."
    ),
    "check": "Check option files and the data and weights they name, without running or writing anything.",
    "doctor": "Find what is wrong with this installation.",
    "options": "List, show and copy the option files that come with esc_arch.",
    "setup-training": "Install BasicSR 1.4.2, which training needs, on any Python.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status.

    It is 0; 2 for a mistake of the user's (one message); 130 for Ctrl-C; 1 when the standard output could not be
    written, and 141 when nobody reads it any more, which end no run.
    """
    argv = sys.argv[1:] if argv is None else argv
    called = next((word for word in argv if word in VERBS), None)
    with safe_streams() as output:
        status = _run(argv, called)
        output.flush()
        if status or output.failure is None:
            return status
        if isinstance(output.failure, BrokenPipeError):
            return UNREAD
        reason = output.failure.strerror or output.failure
        print(f"basicsr {called}: the standard output is incomplete: {reason}.", file=sys.stderr)
        return FAULT


def _run(argv: Sequence[str], called: str | None) -> int:
    parser = argparse.ArgumentParser(
        prog="basicsr", description="BasicSR with the ESC networks. `basicsr VERB --help` says more about a verb."
    )
    parser.add_argument("--version", action="version", version=f"esc_arch {__version__}")
    # torch.distributed.launch puts it before the verb, where it is of no use to anyone (fault 19)
    parser.add_argument("--local_rank", "--local-rank", dest="_", help=argparse.SUPPRESS)
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    leave_current_folder()
    try:
        for name, what in VERBS.items():
            add_arguments(parsers.add_parser(name, help=what, description=what), name)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
            import argcomplete

            argcomplete.autocomplete(parser)
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # with the usage of the verb
            parsers.choices[args.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
        verb = _module(args.verb)
        if args.verb != "doctor":  # where a failure is a line of the report
            # What modules print must not be in the midst of what `check --json` prints
            with contextlib.redirect_stdout(sys.stderr) if args.verb == "check" else contextlib.nullcontext():
                import_modules(getattr(args, "imports", None), "--import")
        return int(verb.run(args))
    except (UserError, KeyboardInterrupt, OSError, SystemExit) as error:
        # Drop a data loader that the traceback holds: as cyclic garbage, it would keep its workers waiting for seconds
        traceback.clear_frames(error.__traceback__)
        fault = system_fault(error) if isinstance(error, OSError) else None
        if isinstance(error, SystemExit) or (isinstance(error, OSError) and fault is None):
            raise
        status, message = describe(error if fault is None else UserError(fault))
        rank = os.environ.get("RANK", "0")
        print(f"basicsr {called}{f' (rank {rank})' * (rank != '0')}: {message}", file=sys.stderr)
        return status


def _module(verb: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{verb.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name != "basicsr":
            raise
        raise UserError(NO_BASICSR) from None
