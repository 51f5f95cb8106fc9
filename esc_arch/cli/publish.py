"""`basicsr publish`: a folder with everything that sharing a network takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from esc_arch.printing import shown
from esc_arch.tools.export.publishing import ModelInfo, publish

from .convert import add_weights_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the weights, the folder, and what no file says."""
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=".pth or .safetensors")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    add("--name", default="", help="name of the model, without its scale")
    add("--author", nargs="+", default=[], metavar="NAME", help="who made it")
    add("--license", default="", metavar="SPDX", help="such as CC-BY-4.0 or MIT")
    add("--dataset", default="", metavar="TEXT", help="training data (default: the experiment's)")
    add("--description", default="", metavar="TEXT", help="what it does; Markdown")
    add("--tags", nargs="+", default=[], metavar="TAG", help="OpenModelDB's, such as photo restoration")
    add("--purpose", default="", metavar="TEXT", help="what it is for, in a line")
    add("--date", default="", metavar="YYYY-MM-DD", help="of publication (default: today)")
    add("--experiment", type=Path, metavar="DIR", help="experiments/NAME, whose settings and scores are shown")
    add("--images", nargs="+", type=Path, default=[], metavar="LR", help="small pictures to show enlarged")
    add("--resources", nargs="+", default=[], metavar="URL", help="addresses of files, or of their folder, ending in /")
    add("--no-onnx", action="store_true", help="without the ONNX file")
    add_weights_arguments(parser, "FOLDER, made by this command,")


def run(args: argparse.Namespace) -> int:
    """Make the folder, and print its files and what is left to do; raises UserError as `publish` does."""
    texts = {key: getattr(args, key) for key in ("name", "dataset", "description", "purpose", "date")}
    published = publish(
        args.model,
        args.output,
        ModelInfo(authors=tuple(args.author), licence=args.license, tags=tuple(args.tags), **texts),
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
        print(f"Note: {shown(note)}")
    print(f"Wrote folder {shown(published.folder)}/")
    return 0
