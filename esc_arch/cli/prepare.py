"""`basicsr prepare`: make the data that option files name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import basicsr  # noqa: F401  first, so that without it the message names it, not what comes with it

from ..data.benchmark import benchmark_folders, prepare_benchmark
from ..data.image_files import folder_sources
from ..data.lmdb_check import listed_sizes
from ..data.photographs import prepare_demo
from ..data.prepare import prepare_train
from ..errors import INTERRUPTED, UserError
from ..printing import shown

__all__ = ["run"]

_DEMO = Path("datasets/demo")


def run(args: argparse.Namespace) -> int:
    """Make the data; returns the exit status: 0, or 130 after Ctrl-C."""
    if args.jobs < 1:
        raise UserError(f"-j {args.jobs}: give 1 or more processes.")
    more = {"jobs": args.jobs, "overwrite": args.overwrite}
    try:
        if args.kind == "train":
            place = Path(os.path.realpath(args.input))
            name = re.sub(r"_?HR$", "", place.name) or place.parent.name
            _print_train(
                prepare_train(
                    folder_sources(args.input),
                    args.output,
                    name if args.name is None else args.name,
                    scales=args.scales,
                    crop_size=args.crop_size,
                    overlap=args.overlap,
                    lr_folders=_lr_folders(args.lr),
                    **more,
                )
            )
        elif args.kind == "benchmark":
            folders = benchmark_folders(args.output, args.scales).values()
            if os.path.realpath(args.input) in map(os.path.realpath, folders):
                raise UserError(f"{args.input} would be written to, but sources are never changed. Choose another -o.")
            per_scale = args.crop == "per-scale"
            sources = folder_sources(args.input)
            _print_benchmark(prepare_benchmark(sources, args.output, scales=args.scales, per_scale=per_scale, **more))
        else:
            lmdbs, made = prepare_demo(args.output, **more)
            _print_train(lmdbs)
            _print_benchmark(made)
            if args.output == _DEMO:  # which the option file names
                print("Next: basicsr options copy train_ESC_x2_demo && basicsr train -opt train_ESC_x2_demo.yml")
    except KeyboardInterrupt:
        print("\nStopped. The same command continues from here.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _lr_folders(given: Sequence[str]) -> dict[int, Path]:
    folders = {}
    for text in given:
        scale, _, folder = text.partition("=")
        if not scale.isdecimal() or not folder:
            raise UserError(f"--lr {text} is invalid. Give a scale and its folder, as in --lr 2=LR_bicubic/X2.")
        folders[int(scale)] = Path(folder)
    return folders


def _print_train(lmdbs: Mapping[int, Path]) -> None:
    sizes = listed_sizes(lmdbs[1]).values()
    count = f"{len(sizes)} sub-image{'s' if len(sizes) != 1 else ''} per scale"
    print(f"Training data: {count}. gt_size can be up to {min(min(size) for size in sizes if size)}.")
    _print_option_lines(lmdbs, "io_backend:\n      type: lmdb")


def _print_benchmark(folders: Mapping[int, Path]) -> None:
    print(f"Benchmark: {len(list(folders[1].glob('*.png')))} images.")
    _print_option_lines(folders, "filename_tmpl: '{{}}x{scale}'\n    io_backend:\n      type: disk")


def _print_option_lines(paths: Mapping[int, Path], further: str) -> None:
    for scale in sorted(paths.keys() - {1}):
        hr, lr = shown(paths[1]), shown(paths[scale])
        print(f"  In an option file with scale: {scale}\n    dataroot_gt: {hr}\n    dataroot_lq: {lr}")
        print(f"    {further.format(scale=scale)}")
