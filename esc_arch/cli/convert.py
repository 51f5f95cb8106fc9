"""`basicsr convert`: print which network a checkpoint is of, and write it in another format or form."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
import yaml

from esc_arch.atomic_io import check_output
from esc_arch.checkpoints.conversion import (
    CHECKPOINT_FORMATS,
    Checkpoint,
    build_network,
    fold,
    is_folded,
    open_checkpoint,
    save_checkpoint,
)
from esc_arch.checkpoints.factorisation import factorise, output_error
from esc_arch.checkpoints.published import resolve
from esc_arch.errors import UserError
from esc_arch.printing import shown

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Describe and convert; raises UserError. The output is YAML: a section for option files, the rest as comments."""
    file_format = _output_format(args)
    args.input = resolve(args.input)
    checkpoint = open_checkpoint(args.input, param_key=args.param_key, window_size=args.window)
    _describe(args.input, checkpoint)
    if args.fold:
        checkpoint = fold(checkpoint)
        _comment("The large kernel was folded.")
    if args.flashbias_rank is not None:
        checkpoint = _factorised(checkpoint, args.flashbias_rank)
    print(yaml.safe_dump({"network_g": checkpoint.network_g}, sort_keys=False), end="")
    for assumption in checkpoint.assumptions:
        _comment(f"Assumed: {assumption}")
    _comment("neosr and traiNNer-redux call upscaling_factor `scale`.")
    if file_format is not None:
        save_checkpoint(checkpoint, args.output, file_format=file_format)
        _comment(f"Wrote {args.output} ({args.output.stat().st_size:,} bytes)")
    return 0


def _output_format(args: argparse.Namespace) -> str | None:
    """The format to write; None for writing nothing."""
    if args.output is None:
        if args.to or args.fold or args.overwrite:
            raise UserError("--to, --fold and --overwrite need an output file: give -o OUTPUT.")
        return None
    check_output(args.output, overwrite=args.overwrite)
    suffix = args.output.suffix.removeprefix(".")
    file_format = args.to or suffix
    if file_format not in CHECKPOINT_FORMATS or (file_format == "safetensors") != (suffix == "safetensors"):
        raise UserError(f"{args.output}: end the name in .pth or .safetensors, or in another suffix with --to pth.")
    return file_format


def _describe(path: Path, checkpoint: Checkpoint) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_network(checkpoint.network_g).parameters())
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.weights.values()}
    weights = "bare weights" if checkpoint.key is None else f"weights under {checkpoint.key}"
    _comment(f"{path}: {weights}, {parameters:,} parameters, {', '.join(sorted(dtypes))}")
    if checkpoint.beside:
        values = (f"{name}: {textwrap.shorten(str(value), 60)}" for name, value in checkpoint.beside.items())
        _comment(f"Other values: {', '.join(values)}")
    if checkpoint.left_out:
        _comment(f"Left out: {', '.join(checkpoint.left_out)} (--param-key K takes other weights)")
    folded = is_folded(checkpoint.weights)
    if folded is not None:
        _comment(f"Large kernel: {'folded' if folded else 'free (not folded)'}")


def _factorised(checkpoint: Checkpoint, rank: int) -> Checkpoint:
    factors, errors = factorise(checkpoint, rank)
    _comment(f"Bias tables replaced by factors of rank {rank}:")
    width = max(len(error.layer) for error in errors)
    _comment(f"  {'layer':{width}}  max error  energy kept")
    for error in errors:
        _comment(f"  {error.layer:{width}}  {error.largest:9.2e}  {error.kept:11.4%}")
    from esc_arch.data.photographs import read_photograph  # BasicSR comes with it

    pixels = torch.from_numpy(read_photograph("astronaut")[60:124, 180:244, ::-1].copy())
    largest, psnr = output_error(checkpoint, factors, pixels.permute(2, 0, 1)[None] / 255)
    _comment(f"Output on a photograph: max difference {largest:.2g} (of 0 .. 1), PSNR {psnr:.2f} dB")
    return factors


def _comment(line: str) -> None:
    """Print a YAML comment."""
    print(f"# {shown(line)}")
