"""`basicsr publish`: a folder with everything that sharing a network takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from esc_arch.tools.export.publishing import Facts, publish

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Make a folder to share a network by: weights, ONNX, option files, model card, and the entry for OpenModelDB."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the weights, the folder, and the facts that no file says."""
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=".pth or .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--name", help="of the model; its scale is put before it")
    parser.add_argument("--author", nargs="+", default=[], metavar="NAME", help="who made it")
    parser.add_argument("--license", metavar="SPDX", help="such as CC-BY-4.0 or MIT")
    parser.add_argument("--dataset", metavar="TEXT", help="what it was trained on; default: the experiment's")
    parser.add_argument("--description", metavar="TEXT", help="what it does; Markdown")
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="OpenModelDB's, such as photo restoration")
    parser.add_argument("--purpose", metavar="TEXT", help="what it is for, a line")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="of publication; default: today")
    parser.add_argument("--experiment", type=Path, metavar="DIR", help="experiments/NAME, whose settings are shown")
    parser.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="LR", help="small pictures to show enlarged"
    )
    parser.add_argument(
        "--resources", nargs="+", default=[], metavar="URL",
        help="where the files will be: addresses of files, or of the folder (ends in a slash)",
    )  # fmt: skip
    parser.add_argument("--no-onnx", action="store_true", help="without the ONNX file")
    parser.add_argument("--param-key", metavar="K", help="take the weights under K (params_ema if there, else params)")
    parser.add_argument("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not say")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER, if it was made by this")


def run(args: argparse.Namespace) -> int:
    """Make the folder, and say what is in it and what is left to do.

    Raises:
        UserError: see `publish`.
    """
    facts = Facts(
        name=args.name,
        authors=tuple(args.author),
        licence=args.license,
        dataset=args.dataset,
        description=args.description,
        tags=tuple(args.tags),
        purpose=args.purpose,
        date=args.date,
    )
    published = publish(
        args.model,
        args.output,
        facts,
        experiment=args.experiment,
        images=args.images,
        urls=args.resources,
        onnx=not args.no_onnx,
        overwrite=args.overwrite,
        param_key=args.param_key,
        window_size=args.window,
    )
    width = max(len(file.name) for file in published.files)
    for file in published.files:
        print(f"{file.name:{width}}  {file.size:>13,} bytes  sha256 {file.sha256}")
    for note in published.notes:
        print(f"Note: {note}")
    print(f"{published.identifier} is in {published.folder}")
    return 0
