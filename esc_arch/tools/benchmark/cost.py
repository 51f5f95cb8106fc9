"""`basicsr benchmark cost`: parameters, multiply-adds, latency and memory of networks, compared with the paper."""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from esc_arch.atomic_io import check_output
from esc_arch.errors import UserError, first_line
from esc_arch.project import add_import_argument

from .counting import count_operations
from .latency import LATENCY_PRECISIONS, LatencyProtocol, measure_latency
from .networks import PRESETS, NetworkSpec, from_option_file, named
from .paper import HD, paper_cost
from .tables import Cell, Column, Table, add_report_arguments, write_report

__all__ = ["HELP", "add_arguments", "network_cost", "run"]

HELP = "Parameters, multiply-adds, latency and memory of networks, compared with the paper."

#: Widths and heights of enlarged images by name; the paper's is HD.
_OUTPUTS = {"HD": HD, "FHD": (1920, 1080), "4K": (3840, 2160)}

_COUNTED = (
    Column("network"),
    Column("scale", style="g"),
    Column("output"),
    Column("input"),
    Column("parameters", style=",d"),
    Column("paper_parameters_k", "paper (K)", "g"),
    Column("parameters_difference_k", "difference (K)", "+.1f"),
    Column("multiply_adds_g", "multiply-adds (G)", ".1f"),
    Column("paper_convention_g", "as the paper counts (G)", ".1f"),
    Column("paper_g", "paper (G)", ".1f"),
    Column("difference", style="+.2%"),
)
_MEASURED = (
    Column("latency_ms", "latency (ms)", ".2f"),
    Column("latency_spread_ms", "spread (ms)", ".2f"),
    Column("paper_latency_ms", "paper (ms)", ".1f"),
    Column("memory_mib", "memory (MiB)", ".0f"),
    Column("paper_memory_mb", "paper (MB)", ".0f"),
    Column("precision"),
    Column("backend"),
    Column("device"),
)
_COUNTING_NOTES = (
    "Input: output / scale, rounded down. Networks with windows other than ESC's get it padded to whole windows, as by "
    "BasicSR's SwinIRModel; their products include the padding.",
    "Parameters: the paper rounds some to thousands and truncates others, so a difference below 1 K means equal.",
    "Multiply-adds: of convolutions, linear layers and matrix products for one image, including both products of "
    "attention; attention and convolutions by the plain formula.",
    "As the paper counts: plus 5 for each output value of a LayerNorm and 1 for each input value of a global pool (as "
    "fvcore does), and the q, k, v projection of the pixels that window attention pads: the paper pads before it, this "
    "package after it, with equal results. The difference is that of this count.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, how, and where it is written."""
    parser.add_argument("-opt", "--opt", nargs="+", type=Path, default=[], metavar="FILE", help="their network_g")
    add_import_argument(parser)
    parser.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: all of them), another registered type of network, or one with its "
        "options, as in 'SwinIR: {upscale: 2, window_size: 8}'",
    )
    parser.add_argument(
        "--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="of networks given without one (2 3 4)"
    )
    parser.add_argument(
        "--output", nargs="+", default=["HD"], metavar="SIZE", help=f"{', '.join(_OUTPUTS)} or as in 1280x720 (HD)"
    )
    parser.add_argument("--no-latency", action="store_true", help="count, but measure neither latency nor memory")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="for latency; auto measures only on a GPU"
    )
    parser.add_argument("--precision", choices=LATENCY_PRECISIONS, default="fp32", help="for latency (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of ESC's window attention, as attn_type (%(default)s)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed runs (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="untimed runs before them (%(default)s)")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print or write the table; raises UserError if a network, a size or the way of measuring cannot be used."""
    if min(args.scales) < 1:
        raise UserError(f"--scales {min(args.scales)}: a scale is an integer of at least 1.")
    names = args.networks if args.networks is not None else [] if args.opt else PRESETS
    networks = [*(network for name in names for network in named(name, args.scales)), *map(from_option_file, args.opt)]
    pairs = list(product(networks, map(_output_size, args.output)))
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device
    protocol = None
    if not args.no_latency and device != "auto":
        protocol = LatencyProtocol(device, args.precision, args.backend, args.runs, args.warmup)
    if args.report is not None:
        check_output(args.report, overwrite=True)
    costs = [network_cost(*pair, protocol) for pair in tqdm(pairs, unit="network", disable=None)]
    columns, notes = [*_COUNTED], [*_COUNTING_NOTES]
    if not args.no_latency:
        columns += _MEASURED
        notes += _latency_notes(protocol)
    heading = ""
    if args.format == "markdown":
        command = shlex.join(["basicsr", *sys.argv[1:]])
        heading = f"# What networks cost\n\nMade by `{command}`; do not edit by hand.\n\n"
    write_report(heading + Table(columns, costs, notes).render(args.format), args.report)
    return 0


def _output_size(text: str) -> tuple[int, int]:
    """Width and height from a name (in any case) or from text such as 1280x720."""
    if text.upper() in _OUTPUTS:
        return _OUTPUTS[text.upper()]
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--output {text} is invalid. Give {', '.join(_OUTPUTS)}, or width x height, as in 1280x720.")
    return int(width), int(height)


def network_cost(
    network: NetworkSpec, output: tuple[int, int] = HD, protocol: LatencyProtocol | None = None
) -> dict[str, Cell]:
    """Count, and with a protocol measure; returns values by the names of columns.

    `output` is width and height of the enlarged image. Those of the input are divided by the scale and rounded down,
    as behind the paper's numbers (426 x 240 for x3 at 1280 x 720). UserError if the network cannot be built, cannot be
    run on images of this size, or does not enlarge by its scale.
    """
    width, height = (int(side / network.scale) for side in output)
    name, size = f"{network.name} x{network.scale:g}", f"{output[0]}x{output[1]}"
    if min(width, height) < 1:
        raise UserError(f"--output {size} is too small for x{network.scale:g}: the input would be empty.")
    padded = [-(-side // network.multiple) * network.multiple for side in (height, width)]
    net = network.build()
    try:
        operations = count_operations(net, *padded)
    except Exception as error:  # networks of other packages may raise anything
        problem = f"{type(error).__name__}: {first_line(error)}"
        image = f"an RGB image of {padded[1]} x {padded[0]}"
        raise UserError(f"Cannot count the operations of {name} for {image}: {problem}") from error
    enlarged = (1, 3, *(round(side * network.scale) for side in padded))
    if operations.output != enlarged:
        raise UserError(
            f"{name} makes {operations.output} of {(1, 3, *padded)}, not {enlarged}. Only networks for "
            "super-resolution can be measured, at their scale."
        )
    cost: dict[str, Cell] = {
        "network": network.name,
        "scale": network.scale,
        "output": size,
        "input": f"{width}x{height}",
        "parameters": operations.parameters,
        "multiply_adds_g": operations.products / 1e9,
        "paper_convention_g": operations.paper / 1e9,
        "latency_ms": "not measured",
    }
    paper = paper_cost(network.published, network.scale, output)
    if paper:
        cost |= {
            "paper_parameters_k": paper["params_k"],
            "parameters_difference_k": operations.parameters / 1e3 - paper["params_k"],
            "paper_g": paper["flops_g"],
            "difference": operations.paper / 1e9 / paper["flops_g"] - 1,
            "paper_latency_ms": paper["latency_ms"],
            "paper_memory_mb": paper["memory_mb"],
        }
    if protocol is None:
        return cost
    cost |= {"precision": protocol.precision, "backend": protocol.backend.lower(), "device": protocol.device_name}
    return cost | measure_latency(network.build(), padded[0], padded[1], protocol)


def _latency_notes(protocol: LatencyProtocol | None) -> list[str]:
    paper = "The paper's latency and memory were measured on its GPU, in float32."
    if protocol is None:
        return [f"Latency: not measured, because there is no CUDA device; --device cpu measures it on the CPU. {paper}"]
    return [
        f"Latency: of one image, after {protocol.warmup + 1} untimed runs: median and interquartile range of "
        f"{protocol.runs} runs, each waited for. Memory: peak of what PyTorch allocated on the GPU, weights included. "
        f"{protocol.device_name}, PyTorch {torch.__version__}.",
        f"{protocol.precision}: {LATENCY_PRECISIONS[protocol.precision]}. {paper}",
        "Backend: of window attention in ESC's networks.",
    ]
