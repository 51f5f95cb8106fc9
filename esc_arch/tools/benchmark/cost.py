"""What networks cost: parameters, multiply-adds, latency and memory, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esc_arch.errors import UserError

from .counting import Operations, count_operations, count_parameters
from .latency import PRECISIONS, Latency, Protocol, measure
from .networks import Network
from .paper import PaperCost, paper_cost
from .tables import Cell, Column, Table

__all__ = ["OUTPUTS", "Cost", "cost_of", "cost_table", "output_size"]

#: Widths and heights of enlarged images by name; the paper's is HD.
OUTPUTS = {"HD": (1280, 720), "FHD": (1920, 1080), "4K": (3840, 2160)}

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
    Column("latency_ratio", "of the paper's", ".2f"),
    Column("memory_mib", "memory (MiB)", ".0f"),
    Column("paper_memory_mb", "paper (MB)", ".0f"),
    Column("memory_ratio", "of the paper's", ".2f"),
    Column("precision"),
    Column("backend"),
    Column("device"),
)

#: What the figures are.
_COUNTING_NOTES = (
    "Input: output / scale, rounded down. Networks with windows other than ESC's get it padded to whole windows, as by "
    "BasicSR's SwinIRModel; their products include the padding.",
    "Parameters: the paper rounds some to thousands and cuts others off, so that a difference within 1 K is none.",
    "Multiply-adds: of convolutions, linear layers and matrix products for one image, both products of attention among "
    "them, attention and convolutions in the plain formula.",
    "As the paper counts: the same plus 5 for each value that a LayerNorm makes and 1 for each that a global pool "
    "averages (so does fvcore), and the projection to q, k and v of the pixels that window attention pads: the paper "
    "pads before that, this package after it, with equal results. The difference is that of this count.",
)

#: Why there is no latency.
_NOT_MEASURED, _OUT_OF_MEMORY = "not measured", "out of memory"


@dataclass(frozen=True)
class Cost:
    """One network at one scale and output size.

    Attributes:
        network: it.
        output: width and height of the enlarged image.
        size: width and height of the image that it is computed from.
        parameters: how many are trained.
        operations: counted.
        latency: measured, or in a few words why not.
        paper: the paper's figures, if it has them.
    """

    network: Network
    output: tuple[int, int]
    size: tuple[int, int]
    parameters: int
    operations: Operations
    latency: Latency | str
    paper: PaperCost | None


def output_size(text: str) -> tuple[int, int]:
    """Width and height of a name of `OUTPUTS` (any case) or of something like 1280x720.

    Raises:
        UserError: it is neither.
    """
    if text.upper() in OUTPUTS:
        return OUTPUTS[text.upper()]
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(
            f"--output {text} is not understood. Give {', '.join(OUTPUTS)}, or width x height, as in 1280x720."
        )
    return int(width), int(height)


def cost_of(network: Network, output: tuple[int, int], protocol: Protocol | None) -> Cost:
    """Count, and measure.

    The input has the output's width and height divided by the scale and rounded down, which are the sizes behind the
    paper's figures (426 x 240 for x3 at 1280 x 720).

    Args:
        output: width and height of the enlarged image.
        protocol: of the latency; None to leave it out.

    Raises:
        UserError: the network cannot be built, cannot be run on images of this size, or does not enlarge by its scale.
    """
    width, height = (int(side / network.scale) for side in output)
    if min(width, height) < 1:
        raise UserError(
            f"--output {output[0]}x{output[1]} is too small for x{network.scale:g}: the input would be empty."
        )
    paper = paper_cost(network.published, network.scale, output) if network.published else None
    net = network.build()
    parameters = count_parameters(net)
    padded_height, padded_width = (-(-side // network.multiple) * network.multiple for side in (height, width))
    try:
        operations = count_operations(net, padded_height, padded_width)
    except Exception as error:  # networks of other packages may raise anything
        raise UserError(
            f"{network.name} x{network.scale:g} cannot be run on an RGB image of {padded_width} x {padded_height}, so "
            f"that its operations cannot be counted: {type(error).__name__}: {_first_line(error)}"
        ) from error
    _check_enlarged(network, operations, padded_height, padded_width)
    latency: Latency | str = _NOT_MEASURED
    if protocol is not None:
        latency = measure(network.build(), padded_height, padded_width, protocol) or _OUT_OF_MEMORY
    return Cost(network, output, (width, height), parameters, operations, latency, paper)


def cost_table(costs: Sequence[Cost], *, protocol: Protocol | None = None, with_latency: bool = True) -> Table:
    """All costs as a table.

    Args:
        protocol: by which latency was measured; None where it was not.
        with_latency: have columns for latency and memory.
    """
    columns, rows, notes = [*_COUNTED], [_counted(cost) for cost in costs], [*_COUNTING_NOTES]
    if with_latency:
        columns += _MEASURED
        rows = [row + _measured(cost, protocol) for row, cost in zip(rows, costs, strict=True)]
        notes += _latency_notes(protocol)
    return Table(columns, rows, notes=notes)


def _check_enlarged(network: Network, operations: Operations, height: int, width: int) -> None:
    wanted = (1, 3, round(height * network.scale), round(width * network.scale))
    if operations.output != wanted:
        raise UserError(
            f"{network.name} x{network.scale:g} makes {operations.output} of an image of (1, 3, {height}, {width}); "
            f"an enlarged image would be {wanted}. Only networks for super-resolution can be measured, at their scale."
        )


def _counted(cost: Cost) -> list[Cell]:
    paper, operations = cost.paper, cost.operations
    return [
        cost.network.name,
        cost.network.scale,
        "x".join(map(str, cost.output)),
        "x".join(map(str, cost.size)),
        cost.parameters,
        paper.parameters_k if paper else None,
        cost.parameters / 1e3 - paper.parameters_k if paper else None,
        operations.products / 1e9,
        operations.paper / 1e9,
        paper.gmacs if paper else None,
        operations.paper / 1e9 / paper.gmacs - 1 if paper else None,
    ]


def _measured(cost: Cost, protocol: Protocol | None) -> list[Cell]:
    paper, latency = cost.paper, cost.latency
    theirs: tuple[Cell, Cell] = (paper.latency_ms, paper.memory_mb) if paper else (None, None)
    precision, device = (protocol.precision, protocol.device_name) if protocol else (None, None)
    if isinstance(latency, str):
        return [latency, None, theirs[0], None, None, theirs[1], None, precision, None, device]
    return [
        latency.median_ms,
        latency.spread_ms,
        theirs[0],
        latency.median_ms / paper.latency_ms if paper else None,
        latency.memory_mib,
        theirs[1],
        latency.memory_mib / paper.memory_mb if paper and latency.memory_mib else None,
        precision,
        latency.backend,
        device,
    ]


def _latency_notes(protocol: Protocol | None) -> list[str]:
    theirs = "The paper's latency and memory are of the GPU it used, in float32."
    if protocol is None:
        return [f"Latency: not measured, as there is no CUDA device; --device cpu measures it on the CPU. {theirs}"]
    return [
        f"Latency: of one image after {protocol.warmup + 1} untimed runs, each run waited for: median of "
        f"{protocol.runs} and distance between their quartiles. Memory: the most that PyTorch had allocated on the "
        f"GPU, weights included. {protocol.device_name}, PyTorch {torch.__version__}.",
        f"{PRECISIONS[protocol.precision].note} {theirs}",
        "Backend: of window attention in ESC's networks. Others are run as they are.",
    ]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
