"""`basicsr export`: a checkpoint as a file for other runtimes, compared with PyTorch before it is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from esc_arch.errors import UserError

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Write a checkpoint for other runtimes: ONNX, a torch.export program, an AOTInductor package."

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
DYNAMIC = "dynamic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the file, and what it is to be."""
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help="a .pth or .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="OUT.onnx or OUT.pt2")
    parser.add_argument("--format", choices=FORMATS, help="onnx for .onnx; torch (default) or aoti for .pt2")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 to 23 (20)")
    parser.add_argument("--batch", default=DYNAMIC, metavar="N", help="images at a time, or dynamic (the default)")
    parser.add_argument("--size", default=DYNAMIC, metavar="HxW", help="of the input, or dynamic (the default)")
    parser.add_argument("--half", action="store_true", help="ONNX in float16; input and output stay float32")
    parser.add_argument(
        "--attention",
        choices=("windows", "whole"),
        help="ONNX: a window at a time (default), or all at once for runtimes without loops, in much more memory",
    )
    parser.add_argument("--no-pad", action="store_true", help="leave padding to whole windows out of the graph")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with PyTorch")
    parser.add_argument("--param-key", metavar="K", help="take the weights under K (params_ema if there, else params)")
    parser.add_argument("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not say")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace) -> int:
    """Export, and print what it differs by.

    Raises:
        UserError: see `esc_arch.tools.export`, or the arguments do not go together.
    """
    file_format = _format(args)
    shape = _shape(args.batch, args.size)

    from esc_arch.tools import export
    from esc_arch.tools.upscale.network import load

    def said(difference: export.Difference) -> None:
        size = f"{difference.batch} x {difference.height} x {difference.width}"
        print(f"  batch x height x width {size}: differs by {difference.largest:.2g} at most", flush=True)

    upscaler = load(args.model, device="cpu", param_key=args.param_key, window_size=args.window)
    print(upscaler)
    for assumption in upscaler.assumptions:
        print(f"Assumed: {assumption}")
    options: dict[str, Any] = {
        "shape": export.InputShape(*shape),
        "pad": not args.no_pad,
        "check": args.check,
        "said": said,
    }
    if file_format == "onnx":
        report = export.export_onnx(
            upscaler,
            args.output,
            opset=args.opset or 20,
            attention=args.attention or "windows",
            half=args.half,
            **options,
        )
    elif file_format == "torch":
        report = export.export_program(upscaler, args.output, **options)
    else:
        report = export.export_compiled(upscaler, args.output, **options)
    compared = "not compared with PyTorch" if report.worst is None else f"differs by {report.worst:.2g} at most"
    print(f"Written: {report.path} ({report.size:,} bytes), input {report.input}; {compared} (of 0 .. 1)")
    return 0


def _format(args: argparse.Namespace) -> str:
    """Everything that can be wrong with the file's name and the options of ONNX alone is said here."""
    suffix = args.output.suffix
    fitting = [name for name, wanted in FORMATS.items() if wanted == suffix]
    if not fitting:
        raise UserError(f"{args.output} does not say its format: let it end in .onnx or .pt2.")
    file_format: str = args.format or fitting[0]
    if file_format not in fitting:
        raise UserError(f"--format {file_format} is written to {FORMATS[file_format]} files, not to {args.output}.")
    if file_format != "onnx":
        for given, option in ((args.opset, "--opset"), (args.half, "--half"), (args.attention, "--attention")):
            if given:
                raise UserError(f"{option} is of ONNX alone: leave it out, or let OUT end in .onnx.")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already. Choose another name, or give --overwrite to replace it.")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise UserError(f"Cannot write {args.output}: it must be a file in a folder that is there.")
    return file_format


def _shape(batch: str, size: str) -> tuple[int | None, int | None, int | None]:
    """Batch, height and width; None for any."""
    try:
        number = None if batch == DYNAMIC else int(batch)
    except ValueError:
        raise UserError(f"--batch {batch}: it must be a number, or {DYNAMIC}.") from None
    if size == DYNAMIC:
        return number, None, None
    try:
        height, width = map(int, size.split("x"))
    except ValueError:
        raise UserError(f"--size {size}: it must be HEIGHTxWIDTH, such as 270x480, or {DYNAMIC}.") from None
    return number, height, width
