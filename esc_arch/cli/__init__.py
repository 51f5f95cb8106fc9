"""The console command `basicsr`: a verb each, a file each.

A verb's module has `HELP`, `add_arguments(parser)` and `run(args)`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import traceback
from collections.abc import Sequence

from esc_arch import __version__
from esc_arch.errors import UNREAD, UserError, describe
from esc_arch.project import import_modules

from . import benchmark, check, convert, doctor, export, prepare, publish, test, train, upscale, warmup

__all__ = ["main"]

VERBS = {
    "train": train,
    "test": test,
    "prepare": prepare,
    "convert": convert,
    "export": export,
    "publish": publish,
    "upscale": upscale,
    "benchmark": benchmark,
    "warmup": warmup,
    "check": check,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0, 2 for a mistake of the user's (one message), 130 for Ctrl-C, 141 when
    nobody reads what is printed any more."""
    parser = argparse.ArgumentParser(
        prog="basicsr", description="BasicSR with the ESC networks. `basicsr VERB --help` says more about a verb."
    )
    parser.add_argument("--version", action="version", version=f"esc_arch {__version__}")
    # torch.distributed.launch puts it before the verb, where it is of no use to anyone (fault 19)
    parser.add_argument("--local_rank", "--local-rank", dest="_", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.HELP))
    args = parser.parse_args(argv)
    try:
        if args.verb != "doctor":  # where a failure is a line of the report
            # What modules print must not be in the midst of what `check --json` prints
            with contextlib.redirect_stdout(sys.stderr) if args.verb == "check" else contextlib.nullcontext():
                import_modules(getattr(args, "imports", None), "--import")
        status = VERBS[args.verb].run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_unread():
            raise
        return UNREAD
    except (UserError, KeyboardInterrupt) as error:
        status, message = describe(error)
        rank = os.environ.get("RANK", "0")
        print(f"basicsr {args.verb}{f' (rank {rank})' * (rank != '0')}: {message}", file=sys.stderr)
        # Drop a data loader that the traceback holds: as cyclic garbage, it would keep its workers waiting for seconds
        traceback.clear_frames(error.__traceback__)
        return status


def _is_unread() -> bool:
    """Whether the reader of standard output has gone, as that of `basicsr doctor | head`; then the rest is dropped."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python writes what is left when it ends
    return gone
