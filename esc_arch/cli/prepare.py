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

__all__ = ["add_arguments", "run"]

_CROP = (
    "per-scale: HR stays whole, and the LR of each scale is made from as much of it as that scale divides, as "
    "published benchmark data are; common: HR is cropped to a multiple of all scales (%(default)s)"
)
_DEMO = Path("datasets/demo")
_LR = "LR images of scale S, named like 0001x2.png or 0001.png, to be used instead of making them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three kinds of data as sub-commands."""
    common = argparse.ArgumentParser(add_help=False)
    jobs = min(os.cpu_count() or 1, 8)  # beyond that, the process that writes is what limits
    common.add_argument("-j", "--jobs", type=int, default=jobs, metavar="N", help="processes (%(default)s)")
    common.add_argument("--overwrite", action="store_true", help="replace data that were made with other settings")

    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument("-i", "--input", type=Path, required=True, metavar="FOLDER", help="the HR images")
    folders.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="where to write")
    folders.add_argument("--scales", type=int, nargs="+", default=[2, 3, 4], metavar="S", help="(2 3 4)")

    kinds = parser.add_subparsers(dest="kind", required=True)

    def add_kind(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}. If it is interrupted, the same command continues."
        return kinds.add_parser(name, parents=parents, help=text, description=description)

    text = "cut HR images and their bicubic LR images into sub-images in LMDBs, OUT/NAME_HR_sub.lmdb and so on"
    train = add_kind("train", text, folders, common)
    train.add_argument("--name", help="how the LMDBs' names begin (the input folder's name without HR)")
    train.add_argument("--crop-size", type=int, default=480, metavar="N", help="HR pixels (%(default)s)")
    train.add_argument("--overlap", type=int, default=240, metavar="N", help="HR pixels (%(default)s)")
    train.add_argument("--lr", nargs="+", action="extend", default=[], metavar="S=FOLDER", help=_LR)
    text = "write HR images to OUT/HR and their bicubic LR images to OUT/LR_bicubic/Xs, as PNG files"
    benchmark = add_kind("benchmark", text, folders, common)
    benchmark.add_argument("--crop", choices=["per-scale", "common"], default="per-scale", help=_CROP)
    text = "make LMDBs for training and a benchmark folder from a few photographs that come with scikit-image"
    demo = add_kind("demo", text, common)
    demo.add_argument("-o", "--output", type=Path, default=_DEMO, metavar="OUT", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Make the data; returns the exit status: 0, or 130 after Ctrl-C."""
    if args.jobs < 1:
        raise UserError(f"-j {args.jobs}: give 1 or more processes.")
    more = {"jobs": args.jobs, "overwrite": args.overwrite}
    try:
        if args.kind == "train":
            name = re.sub(r"_?HR$", "", args.input.resolve().name) or args.input.resolve().parent.name
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
            if args.input.resolve() in (folder.resolve() for folder in folders):
                raise UserError(f"{args.input} would be written to, but sources are never changed. Choose another -o.")
            per_scale = args.crop == "per-scale"
            sources = folder_sources(args.input)
            _print_benchmark(prepare_benchmark(sources, args.output, scales=args.scales, per_scale=per_scale, **more))
        else:
            lmdbs, made = prepare_demo(args.output, **more)
            _print_train(lmdbs)
            _print_benchmark(made)
            if args.output == _DEMO:  # which the option file names
                print("Next, from a clone of the repository: basicsr train -opt options/train_ESC_x2_demo.yml")
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
        print(f"  In an option file with scale: {scale}\n    dataroot_gt: {paths[1]}\n    dataroot_lq: {paths[scale]}")
        print(f"    {further.format(scale=scale)}")
