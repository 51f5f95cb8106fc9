"""`basicsr benchmark cost`: parameters, multiply-adds, latency and memory of networks beside the paper's."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from esc_arch.errors import UserError
from esc_arch.project import add_import_argument

from .cost import OUTPUTS, cost_of, cost_table, output_size
from .latency import PRECISIONS, Protocol
from .networks import PRESETS, Network, from_option_file, named
from .tables import FORMATS, Table, check_report, deliver

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Parameters, multiply-adds, latency and memory of networks, beside the paper's."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, how, and where it is written."""
    parser.add_argument("-opt", nargs="+", type=Path, default=[], metavar="FILE", help="network_g of option files")
    add_import_argument(parser)
    parser.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (all of them, where nothing is named), another registered type of network, or one "
        "with its options, as in 'SwinIR: {upscale: 2, window_size: 8}'",
    )
    parser.add_argument(
        "--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="of the networks without one (2 3 4)"
    )
    parser.add_argument(
        "--output", nargs="+", default=["HD"], metavar="SIZE", help=f"{', '.join(OUTPUTS)} or as in 1280x720 (HD)"
    )
    parser.add_argument("--no-latency", action="store_true", help="count, but measure neither latency nor memory")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the latency; auto measures on a GPU alone"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the latency (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of ESC's window attention, as attn_type (%(default)s)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="untimed runs before (%(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="(%(default)s)")
    parser.add_argument("-o", "--report", type=Path, metavar="FILE", help="write it here instead of printing it")


def run(args: argparse.Namespace) -> int:
    """Print or write the table.

    Raises:
        UserError: a network, a size or the way of measuring cannot be used.
    """
    outputs = [output_size(text) for text in args.output]
    networks = _networks(args)
    protocol = _protocol(args)
    check_report(args.report)
    combinations = [(network, output) for network in networks for output in outputs]
    costs = [cost_of(*each, protocol) for each in tqdm(combinations, unit="network", disable=None)]
    deliver(_report(cost_table(costs, protocol=protocol, with_latency=not args.no_latency), args), args.report)
    return 0


def _networks(args: argparse.Namespace) -> list[Network]:
    if any(scale < 1 for scale in args.scales):
        raise UserError(f"--scales {min(args.scales)}: a scale is a whole number of at least 1.")
    names = args.networks if args.networks is not None else [] if args.opt else PRESETS
    networks = [network for name in names for network in named(name, args.scales)]
    networks += map(from_option_file, args.opt)
    if not networks:
        raise UserError(f"None of the networks named has a scale of --scales {' '.join(map(str, args.scales))}.")
    return networks


def _protocol(args: argparse.Namespace) -> Protocol | None:
    """How to measure; None for not measuring."""
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device
    if args.no_latency or device == "auto":
        return None
    return Protocol(device=device, precision=args.precision, backend=args.backend, runs=args.runs, warmup=args.warmup)


def _report(table: Table, args: argparse.Namespace) -> str:
    if args.format == "text":
        return table.without_empty_columns().text()
    if args.format == "markdown":
        heading = f"# What networks cost\n\nMade by `{_command(args)}`; not to be edited by hand.\n\n"
        return heading + table.without_empty_columns().markdown()
    return table.render(args.format)


def _command(args: argparse.Namespace) -> str:
    """The command line that these arguments come from, in a fixed order and without what is the default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["basicsr", "benchmark", "cost"]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default:
            continue
        flag = "-o" if action.dest == "report" else action.option_strings[0]
        values: Sequence[object] = [] if value is True else value if isinstance(value, list) else [value]
        words += [flag, *map(str, values)]
    return shlex.join(words)
