"""Images of any size in bounded memory: time and peak memory from 1 to 400 megapixels.

    python benchmarks/large_images.py --max-memory 2G --json large_images.json

enlarges random images with base ESC x4, each size in a process of its own: in exact parts (`enlarge`), and at
once where that fits into the machine's memory. Memory is the most that the whole process has had resident, of which the
libraries take some hundred MiB; on a GPU, the most that was allocated there stands beside it. The difference is the
largest one between both results. `--megapixels 1 4 16` takes a part of it; 400 take hours on a few cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import esc_arch  # isort: skip  # noqa: F401  makes basicsr importable
import common
import numpy as np
import numpy.typing as npt
import torch
from basicsr.archs import build_network
from common import MIB, Trial
from torch import Tensor

from esc_arch.options.files import load_yaml
from esc_arch.tools.upscale.large_images import enlarge, whole
from esc_arch.tools.upscale.memory import parse_memory
from esc_arch.tools.upscale.network import PRECISIONS, Upscaler, load

OPTIONS = Path(__file__).parents[1] / "options"
MEGAPIXELS = (1, 4, 16, 64, 100, 200, 400)
#: Both results are compared up to here; they take 24 bytes a pixel together.
LARGEST_COMPARED = 64

Image = npt.NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.disable(logging.INFO)  # basicsr prints every network that it builds
    if args.of_own_process is not None:
        measure_own_process(args)
        return 0
    about, operators = common.machine(args.device), common.prepare_operators()
    print(f"{about}; {operators}\n", flush=True)
    record: dict[str, Any] = {"machine": about, "operators": operators, "tables": []}
    measure_sizes(args, record)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=list(MEGAPIXELS), help="of the results")
    parser.add_argument("--max-memory", default="2G", help="of the process, such as 2G")
    parser.add_argument("--network", default="ESC", metavar="NAME", help="of options/test_*.yml, such as ESC-Real")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint in place of random weights")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for features that do not fit into memory")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes and a small network, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there, too")
    parser.add_argument("--of-own-process", metavar="WHAT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        args.megapixels = args.megapixels[:2]
    return args


def make_upscaler(args: argparse.Namespace) -> Upscaler:
    precision = PRECISIONS[args.precision]
    if args.weights is not None:
        return load(args.weights, device=args.device, precision=args.precision)
    options = load_yaml(OPTIONS / f"test_{args.network.replace('-', '_')}_x{args.scale}.yml")["network_g"]
    if args.quick:
        options |= {"dim": 16, "pdim": 8, "n_blocks": 1, "conv_blocks": 2, "window_size": 16, "num_heads": 2}
    net = common.randomise(build_network(dict(options))).eval().requires_grad_(False).to(args.device)
    return Upscaler(net, options, Path(f"{args.network} x{args.scale}"), torch.device(args.device), precision)


# --- time and memory by size ----------------------------------------------------------------------------------------


def measure_sizes(args: argparse.Namespace, record: dict[str, Any]) -> None:
    rows = []
    for megapixels in args.megapixels:
        trials = {}
        for what in ("exact", "whole", "difference"):
            common.progress(f"{megapixels:g} megapixels: {what}")
            trials[what] = Trial(what)
            if what != "difference" or (trials["whole"].runs and megapixels <= LARGEST_COMPARED):
                common.measure_in_own_process(trials[what], __file__, own_arguments(args, megapixels, what))
        common.keep(
            record, {"megapixels": megapixels, **{name: each.as_record() for name, each in trials.items()}}, args.json
        )
        rows.append(row_of(megapixels, trials))
    print(f"{args.network} x{args.scale}, {args.precision}, max_memory {args.max_memory}:\n")
    print(common.markdown(HEAD, rows), flush=True)


HEAD = ("result, MP", "parts, s", "s / MP", "resident, MiB", "GPU, MiB", "whole, s", "resident, MiB", "difference")


def row_of(megapixels: float, trials: dict[str, Trial]) -> list[str]:
    exact, at_once = trials["exact"], trials["whole"]
    return [
        f"{megapixels:g}",
        exact.failure or common.number(exact.first, ".1f"),
        "-" if exact.first is None else f"{exact.first / megapixels:.2f}",
        mebibytes(exact.memory),
        mebibytes(getattr(exact, "gpu", None)),
        at_once.failure or common.number(at_once.first, ".1f"),
        mebibytes(at_once.memory),
        common.number(trials["difference"].error, ".1e"),
    ]


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.0f}"


def own_arguments(args: argparse.Namespace, megapixels: float, what: str) -> list[str]:
    arguments = ["--of-own-process", what, "--megapixels", str(megapixels), "--max-memory", args.max_memory]
    arguments += ["--network", args.network, "--scale", str(args.scale), "--device", args.device]
    arguments += ["--precision", args.precision]
    for option in ("weights", "scratch"):
        value = getattr(args, option)
        arguments += [f"--{option}", str(value)] if value is not None else []
    return arguments + (["--quick"] if args.quick else [])


def measure_own_process(args: argparse.Namespace) -> None:
    """One size in one way; prints a line for `common.measure_in_own_process`."""
    upscaler = make_upscaler(args)
    image = random_image(args.megapixels[0], upscaler.scale)
    what = args.of_own_process
    if what != "exact":
        common.limit_own_memory()
    trial = Trial(what)
    result: dict[str, Any] = {}

    def measure() -> None:
        start = time.perf_counter()
        if what == "exact":
            for _ in in_parts(args, upscaler, image, parse_memory(args.max_memory)):
                pass  # what a program would write to a file
        elif what == "whole":
            whole(upscaler, image, None)
        else:
            result["error"] = difference(args, upscaler, image)
        result["first"] = time.perf_counter() - start

    trial.attempt(measure)
    result |= {"memory": common.high_water(), "failure": trial.failure}
    result["gpu"] = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    print(json.dumps(result))


def difference(args: argparse.Namespace, upscaler: Upscaler, image: Image) -> float:
    """The largest one between the image at once and in parts, without a third picture."""
    at_once = whole(upscaler, image, None)
    largest, top = 0.0, 0
    for block in in_parts(args, upscaler, image, parse_memory(args.max_memory) + at_once.nbytes):
        largest = max(largest, common.largest_difference(block, at_once[:, top : top + block.shape[1]]))
        top += block.shape[1]
    return largest


def in_parts(args: argparse.Namespace, upscaler: Upscaler, image: Image, budget: int) -> Iterator[Tensor]:
    return enlarge(upscaler, image, max_memory=budget, scratch=args.scratch, at_once=False)


def random_image(megapixels: float, scale: float) -> Image:
    """A picture of 4 : 3 whose enlargement has so many megapixels."""
    pixels = megapixels * 1e6 / scale**2
    height, width = round(math.sqrt(pixels * 3 / 4)), round(math.sqrt(pixels * 4 / 3))
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
