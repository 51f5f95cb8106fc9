"""Loss curves of the demo training in fp32 and in bf16, from the same seed: the same batches in the same order.

    python benchmarks/training_curves.py

Trains the network of options/train_ESC_x2_demo.yml on its photographs, in a temporary folder, for 500 iterations at
each precision; plots the losses, and prints their means at the end and the PSNR on the validation photographs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import esc_arch
from esc_arch.data.photographs import prepare_demo
from esc_arch.training.history import History

OPTION_FILE = Path(__file__).parents[1] / "options" / "train_ESC_x2_demo.yml"
PRECISIONS = {"fp32": "none", "bf16": "bf16"}
COLORS = {"fp32": "#1f5a8a", "bf16": "#d0722a"}
ITERATIONS = 500
#: Iterations whose losses a point of a smoothed curve is the mean of; one batch says little.
SMOOTHED = 25
LAST = 100

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--figure", type=Path, default=Path(__file__).parent / "figures" / "training_precision.png")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the option file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prepare_demo(Path(folder, "datasets", "demo"))
        runs = {name: train(Path(folder), name, args) for name in PRECISIONS}
    losses = {name: [record["l_pix"] for record in records if "l_pix" in record] for name, records in runs.items()}
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(losses, args.figure)
    print(f"{args.iterations} iterations of {OPTION_FILE.name} from the same seed; curves in {args.figure}\n")
    print(f"| precision | mean loss of the last {LAST} | PSNR of the validation, dB |")
    print("|---|---|---|")
    for name, records in runs.items():
        psnr = next(record["psnr"] for record in reversed(records) if "psnr" in record)
        print(f"| {name} | {statistics.fmean(losses[name][-LAST:]):.5f} | {psnr:.3f} |")
    apart = [abs(a - b) / a for a, b in zip(*(smoothed(values) for values in losses.values()), strict=True)]
    print(
        f"\nThe curves, smoothed over {SMOOTHED} iterations, are at most {max(apart):.2%} apart, "
        f"{statistics.median(apart):.2%} in the median.",
        flush=True,
    )


def train(folder: Path, precision: str, args: argparse.Namespace) -> list[Record]:
    """Train in `folder`; all figures of the training."""
    forced = [
        f"name={precision}",
        f"train:amp={PRECISIONS[precision]}",
        f"train:total_iter={args.iterations}",
        f"val:val_freq={args.iterations}",
        "val:comparison=false",
        "val:tb_images=0",
        "logger:print_freq=1",
        "logger:use_tb_logger=false",
        *(["num_gpu=0"] if args.device == "cpu" else []),
        *args.force_yml,
    ]
    command = [sys.executable, "-m", "esc_arch", "train", "-opt", str(OPTION_FILE), "--force_yml", *forced]
    search = os.pathsep.join([str(Path(esc_arch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    print(f"training in {precision}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"The training in {precision} failed:\n{done.stderr[-4000:]}")
    return History(folder / "experiments" / precision / "metrics.jsonl").records()


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of the last `SMOOTHED` values at each place; fewer at the beginning."""
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Both curves, and below them how far they are apart."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, values in losses.items():
        iterations = range(1, len(values) + 1)
        above.plot(iterations, values, color=COLORS[name], linewidth=0.5, alpha=0.35)
        dashes = (0, (4, 3)) if name == "bf16" else "solid"  # or it would hide the other
        above.plot(iterations, smoothed(values), color=COLORS[name], linewidth=1.6, linestyle=dashes, label=name)
    fp32, bf16 = (smoothed(losses[name]) for name in ("fp32", "bf16"))
    below.plot(range(1, len(fp32) + 1), [100 * (b - a) / a for a, b in zip(fp32, bf16, strict=True)], color="0.3")
    below.axhline(0, color="0.7", linewidth=0.6)
    above.set(yscale="log", ylabel="L1 loss", title=f"ESC x2 demo: each batch, and means of {SMOOTHED}")
    above.legend(frameon=False)
    below.set(xlabel="iteration", ylabel="bf16 - fp32, %")
    canvas.print_png(path)


if __name__ == "__main__":
    main()
