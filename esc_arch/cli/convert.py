"""`basicsr convert`: say which network a checkpoint is of, and write it in another format or form."""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from esc_arch.checkpoints.conversion import (
    FORMATS,
    BiasError,
    Checkpoint,
    build_network,
    factorise,
    fold,
    is_folded,
    open_checkpoint,
    output_error,
    save_checkpoint,
)
from esc_arch.data.photographs import read_photograph
from esc_arch.errors import UserError

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Print the network_g section of a checkpoint, and convert it: .pth, .safetensors, folded, factors for tables."

#: The part of the photograph that two networks are compared on: top, left, and the side in pixels.
TEST_CROP = (60, 180, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, where to write it, and what to do with it."""
    parser.add_argument("input", type=Path, metavar="INPUT", help="a checkpoint (.pth, .safetensors)")
    parser.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help="write it here; otherwise it is described")
    parser.add_argument("--to", choices=FORMATS, help="format of OUTPUT, where its name does not end in one of them")
    parser.add_argument("--param-key", metavar="K", help="take the weights under K (params_ema if there, else params)")
    parser.add_argument("--fold", action="store_true", help="store the symmetrised large kernel, for inference alone")
    parser.add_argument(
        "--flashbias-rank",
        type=int,
        metavar="R",
        help="replace bias tables by factors of rank R (attn_type: FlashBias), and print the errors that this makes",
    )
    parser.add_argument("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not say")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there")


def run(args: argparse.Namespace) -> int:
    """Describe and convert. What is printed is YAML: a section for option files, the rest as comments.

    Raises:
        UserError: see `esc_arch.checkpoints.conversion`, or the arguments do not go together.
    """
    file_format = _output_format(args)
    checkpoint = open_checkpoint(args.input, param_key=args.param_key, window_size=args.window)
    _say(*_origin(args.input, checkpoint))
    if args.fold:
        checkpoint = fold(checkpoint)
        _say("The large kernel was folded.")
    if args.flashbias_rank is not None:
        original = checkpoint
        checkpoint, errors = factorise(original, args.flashbias_rank)
        _say(f"Bias tables replaced by factors of rank {args.flashbias_rank}:", *_bias_table(errors))
        output = output_error(original, checkpoint, _test_image())
        _say(f"Output on a photograph: differs by {output.largest:.2g} at most (of 0 .. 1), PSNR {output.psnr:.2f} dB.")
    print(yaml.safe_dump({"network_g": checkpoint.network_g}, sort_keys=False), end="")
    _say(*(f"Assumed: {assumption}" for assumption in checkpoint.assumptions))
    _say("neosr and traiNNer-redux call upscaling_factor `scale`.")
    if file_format is not None:
        save_checkpoint(checkpoint, args.output, file_format=file_format)
        _say(f"Written: {args.output} ({args.output.stat().st_size:,} bytes)")
    return 0


def _output_format(args: argparse.Namespace) -> str | None:
    """The format to write; None for writing nothing. Everything that can be wrong with the arguments is said here."""
    if args.output is None:
        for given, option in ((args.to, "--to"), (args.fold, "--fold"), (args.overwrite, "--overwrite")):
            if given:
                raise UserError(f"{option} is about a file that is written: name it with -o.")
        return None
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already. Choose another name, or give --overwrite to replace it.")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise UserError(f"Cannot write {args.output}: it must be a file in a folder that is there.")
    suffix = args.output.suffix.removeprefix(".")
    if args.to is None and suffix not in FORMATS:
        raise UserError(f"{args.output} does not say its format: let it end in .pth or .safetensors, or give --to.")
    if args.to is not None and (args.to == "safetensors") != (suffix == "safetensors"):
        raise UserError(f"{args.output} would be read as another format than --to {args.to}. Choose another suffix.")
    return args.to or suffix


def _origin(path: Path, checkpoint: Checkpoint) -> list[str]:
    with torch.device("meta"):
        parameters = dict(build_network(checkpoint.network_g).named_parameters())
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.weights.values())
    lines = [
        f"{path}: weights {'by themselves' if checkpoint.key is None else f'under {checkpoint.key}'}, "
        f"{sum(parameter.numel() for parameter in parameters.values()):,} parameters, "
        f"{len(checkpoint.weights)} tensors ({', '.join(f'{count} {name}' for name, count in types.most_common())})"
    ]
    if checkpoint.beside:
        values = (f"{name}: {textwrap.shorten(str(value), 60)}" for name, value in checkpoint.beside.items())
        lines.append(f"Beside them: {', '.join(values)}")
    if checkpoint.left_out:
        lines.append(f"Left out: {', '.join(checkpoint.left_out)} (--param-key K takes other weights)")
    folded = is_folded(checkpoint.weights)
    if folded is not None:
        lines.append(f"Large kernel: {'folded' if folded else 'free (not folded)'}")
    return lines


def _bias_table(errors: Sequence[BiasError]) -> list[str]:
    width = max(len(error.layer) for error in errors)
    return [
        f"  {'layer':{width}}  max error  rms error  energy kept",
        *(f"  {error.layer:{width}}  {error.largest:9.2e}  {error.rms:9.2e}  {error.kept:11.4%}" for error in errors),
    ]


def _test_image() -> Tensor:
    top, left, side = TEST_CROP
    photograph = read_photograph("astronaut")[top : top + side, left : left + side, ::-1].copy()
    return torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255


def _say(*lines: str) -> None:
    """Print comments. What names and values of a file contain must neither end the line nor steer the terminal."""
    for line in lines:
        print("# " + "".join(character if character.isprintable() else "?" for character in line))
