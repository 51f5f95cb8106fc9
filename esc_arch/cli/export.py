"""`basicsr export`: a checkpoint as a file for other runtimes, compared with PyTorch before it is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from esc_arch.atomic_io import check_output
from esc_arch.errors import UserError
from esc_arch.printing import shown
from esc_arch.tools import export
from esc_arch.tools.upscale import load

__all__ = ["run"]

#: The suffix of each format, and what writes it.
FORMATS: dict[str, tuple[str, Callable[..., export.ExportResult]]] = {
    "onnx": (".onnx", export.export_onnx),
    "torch": (".pt2", export.export_program),
    "aoti": (".pt2", export.export_compiled),
}


def run(args: argparse.Namespace) -> int:
    """Export, and print the differences from PyTorch; raises UserError as `esc_arch.tools.export` does."""
    matching = [name for name, (suffix, _) in FORMATS.items() if suffix == args.output.suffix]
    file_format = args.format or next(iter(matching), "")
    if file_format not in matching:
        raise UserError(f"{args.output}: the suffix must be .onnx for --format onnx, .pt2 for torch and aoti.")
    given = {"opset": args.opset, "attention": args.attention, "half": args.half}
    options = {name: value for name, value in given.items() if value}
    if options and file_format != "onnx":
        raise UserError("--opset, --half and --attention are for ONNX only: omit them, or name an .onnx file.")
    check_output(args.output, overwrite=args.overwrite)
    shape = export.InputShape(*_shape(args.batch, args.size))
    upscaler = load(args.model, device="cpu", param_key=args.param_key, window_size=args.window)
    print(upscaler)
    for assumption in upscaler.assumptions:
        print(f"Assumed: {assumption}")
    _, write = FORMATS[file_format]
    result = write(upscaler, args.output, shape=shape, pad=not args.no_pad, check=args.check, **options)
    for batch, largest in result.differences.items():
        print(f"  {batch}: max difference {largest:.2g}")
    compared = "not compared with PyTorch" if result.worst is None else f"max difference {result.worst:.2g} (of 0 .. 1)"
    print(f"Wrote {shown(args.output)} ({args.output.stat().st_size:,} bytes), input {shape}; {compared}")
    return 0


def _shape(batch: str, size: str) -> list[int | None]:
    """Batch, height and width; None for any."""
    parts = [batch, *(["dynamic", "dynamic"] if size == "dynamic" else size.split("x"))]
    try:
        numbers = [None if part == "dynamic" else int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise UserError(f"--batch {batch} --size {size}: give numbers, such as --batch 1 --size 270x480, or dynamic.")
    return numbers
