"""`basicsr benchmark`: the paper's tables, a sub-command each; their modules are like those of the verbs."""

from __future__ import annotations

import argparse

from esc_arch.tools.benchmark import cost, data, quality

__all__ = ["add_arguments", "run"]

PARTS = {"cost": cost, "quality": quality, "data": data}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, part in PARTS.items():
        part.add_arguments(parts.add_parser(name, help=part.HELP, description=part.HELP))


def run(args: argparse.Namespace) -> int:
    """Run a sub-command; returns the exit status."""
    return PARTS[args.part].run(args)
