"""The flags of every verb. Nothing here waits for PyTorch or BasicSR: help, and a mistyped flag, are answered at once.

Choices are those of the modules that do the work, which tests/cli/test_arguments.py compares with them.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["add_arguments"]

_DEVICES = ("auto", "cpu", "cuda")
_LAUNCHERS = ("none", "pytorch", "slurm")
_TABLE_FORMATS = ("text", "markdown", "csv", "json")
_PAPER_ROWS = ("ESC-FP", "ESC-light", "ESC", "HiT-SRF", "SwinIR-light", "ESC-DFLIP", "ESC-LTE")
_WEIGHTS = ".pth or .safetensors"


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add a verb's flags, and its sub-commands."""
    _VERBS[verb](parser)


def _pipeline(parser: argparse.ArgumentParser) -> None:
    """BasicSR's flags."""
    add = parser.add_argument
    add("-opt", "--opt", required=True, metavar="FILE", help="option file (YAML)")
    add("--launcher", choices=_LAUNCHERS, default="none", help="what started the processes; torchrun is recognised")
    add("--auto_resume", action="store_true", help="go on from the last saved training state")
    _add_no_build(parser)
    add("--debug", action="store_true", help="a short try: log, validate and save every few iterations")
    # Processes started by torch.distributed.launch are given it, in either spelling (fault 19)
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    add(
        "--force_yml",
        nargs="+",
        metavar="KEY[:KEY...]=VALUE",
        help="set options over those of the file, such as train:ema_decay=0.999; null removes a key",
    )
    _add_import(parser)


def _prepare(parser: argparse.ArgumentParser) -> None:
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
    lr_help = "LR images of scale S, named like 0001x2.png or 0001.png, to be used instead of making them"
    train.add_argument("--lr", nargs="+", action="extend", default=[], metavar="S=FOLDER", help=lr_help)
    text = "write HR images to OUT/HR and their bicubic LR images to OUT/LR_bicubic/Xs, as PNG files"
    benchmark = add_kind("benchmark", text, folders, common)
    crop_help = (
        "per-scale: HR stays whole, and the LR of each scale is made from as much of it as that scale divides, as "
        "published benchmark data are; common: HR is cropped to a multiple of all scales (%(default)s)"
    )
    benchmark.add_argument("--crop", choices=["per-scale", "common"], default="per-scale", help=crop_help)
    text = "make LMDBs for training and a benchmark folder from a few photographs that come with scikit-image"
    demo = add_kind("demo", text, common)
    demo.add_argument("-o", "--output", type=Path, default=Path("datasets/demo"), metavar="OUT", help="(%(default)s)")


def _convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="a checkpoint (.pth, .safetensors)")
    add("-o", "--output", type=Path, metavar="OUTPUT", help="write it here; default: describe it only")
    add("--to", choices=("pth", "safetensors"), help="format of OUTPUT; default: that of its suffix")
    add("--fold", action="store_true", help="store the symmetrised large kernel, for inference only")
    rank_help = "replace bias tables by factors of rank R (attn_type: FlashBias), and print the resulting errors"
    add("--flashbias-rank", type=int, metavar="R", help=rank_help)
    _add_weights(parser, "OUTPUT")


def _export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=_WEIGHTS)
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="OUT.onnx or OUT.pt2")
    add("--format", choices=("onnx", "torch", "aoti"), help="onnx for .onnx; torch (default) or aoti for .pt2")
    add("--opset", type=int, metavar="N", help="ONNX opset, 18 to 23 (default: 20)")
    add("--batch", default="dynamic", metavar="N", help="batch size (default: dynamic)")
    add("--size", default="dynamic", metavar="HxW", help="input size (default: dynamic)")
    add("--half", action="store_true", help="ONNX in float16; input and output stay float32")
    attention_help = "ONNX: a window at a time (default), or all at once for runtimes without loops, in far more memory"
    add("--attention", choices=("windows", "whole"), help=attention_help)
    add("--no-pad", action="store_true", help="leave padding to whole windows out of the graph")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with PyTorch")
    _add_weights(parser, "OUT")


def _publish(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=_WEIGHTS)
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
    _add_weights(parser, "FOLDER, made by this command,")


def _upscale(parser: argparse.ArgumentParser) -> None:
    _add_import(parser)
    add = parser.add_argument
    add(
        "-i",
        "--input",
        nargs="+",
        required=True,
        help="files, and folders with all in them; - reads a list, one a line",
    )
    add("-o", "--output", type=Path, required=True, help="a folder, or a file when the input is one file")
    add("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=_WEIGHTS)
    add("-s", "--outscale", type=float, metavar="S", help="enlarge by S; default: as the network does")
    add("-t", "--tile", type=int, default=0, metavar="N", help="parts of at most N pixels, with the same result")
    add("--tile_pad", type=int, metavar="N", help="accepted without effect: parts need no overlap")
    add("--pre_pad", type=int, default=0, metavar="N", help="pixels added at each side, then cropped")
    add("--max-memory", metavar="SIZE", help="such as 2G: in parts that fit, with the same result")
    add("--fp32", action="store_true", help="full precision on GPUs, too; CPUs always have it")
    add("-g", "--gpu-id", type=int, metavar="N", help="this GPU; -1 is the CPU; default: the first GPU")
    add("--batch", type=int, metavar="N", help="images of one size that run together")
    add("--alpha_upsampler", choices=("network", "bicubic"), default="network", help="for alpha; default: network")
    add("--suffix", default="out", help="results are NAME_SUFFIX; default: out; '' for none")
    extensions = ("auto", "png", "jpg", "webp", "tiff")
    add("--ext", choices=extensions, default="auto", help="format of results; auto: the input's")
    add("--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP, 1 to 100; default: 95")
    add("--lossless", action="store_true", help="WebP without loss")
    add("--codec", default="auto", metavar="NAME", help="encoder of videos; default: libx264, or libvpx-vp9 in .webm")
    add("--crf", type=float, metavar="Q", help="CRF of videos, 0 is best; default: 17 for x264")
    add("--pixel-format", default="auto", metavar="NAME", help="of videos, FFmpeg's name; default: the source's")
    add("--overwrite", action="store_true", help="overwrite existing results (default: skip)")
    add("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not say")
    _add_no_build(parser)


def _benchmark(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, (text, add) in _BENCHMARKS.items():
        add(parts.add_parser(name, help=text, description=text))


def _benchmark_cost(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-opt", "--opt", nargs="+", type=Path, default=[], metavar="FILE", help="network_g of these files")
    _add_import(parser)
    add(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="ESC, ESC-light, ESC-FP and others of the paper (default: all of them), another registered type of "
        "network, or one with its options, as in 'SwinIR: {upscale: 2, window_size: 8}'",
    )
    add("--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="of networks given without one (2 3 4)")
    add("--output", nargs="+", default=["HD"], metavar="SIZE", help="HD, FHD, 4K or as in 1280x720 (HD)")
    add("--no-latency", action="store_true", help="count, but measure neither latency nor memory")
    add("--device", choices=_DEVICES, default="auto", help="for latency; auto measures only on a GPU")
    precisions = ("fp32", "tf32", "bf16", "fp16")
    add("--precision", choices=precisions, default="fp32", help="for latency (%(default)s)")
    add("--backend", default="auto", help="of ESC's window attention, as attn_type (%(default)s)")
    add("--runs", type=int, default=20, metavar="N", help="timed runs (%(default)s)")
    add("--warmup", type=int, default=5, metavar="N", help="untimed runs before them (%(default)s)")
    _add_report(parser)


def _benchmark_quality(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-opt", "--opt", nargs="+", type=Path, required=True, metavar="FILE", help="option files of tests")
    _add_import(parser)
    add("-m", "--weights", nargs="+", metavar="FILE", help="one for each option file, over its pretrain_network_g")
    add(
        "--protocol",
        choices=("published", "srmodel", "ensemble"),
        help="published: the image padded by reflection to whole windows; srmodel: as it is; ensemble: published, mean "
        "over eight orientations (default: that of the option file, or published)",
    )
    paper_help = "the paper's scores to compare with (default: recognised by the network)"
    add("--paper", choices=(*_PAPER_ROWS, "none"), help=paper_help)
    add("--baseline", metavar="FILE", help="an option file to compare images with, or bicubic")
    cost_help = "from basicsr benchmark cost --format json, for PSNR against latency"
    add("--cost", type=Path, metavar="FILE", help=cost_help)
    add("--device", choices=_DEVICES, default="auto", help="(that of the file)")
    add("--launcher", choices=_LAUNCHERS, default="none", help="as in basicsr test")
    add("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="as in basicsr test")
    add("--format", choices=_TABLE_FORMATS, default="text", help="of what is printed (%(default)s)")
    add("-o", "--output", type=Path, metavar="FOLDER", help="a new folder for tables in all formats, plots and crops")
    add("--no-figures", action="store_true", help="only tables in FOLDER")


def _benchmark_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-opt", "--opt", nargs="+", type=Path, default=[], metavar="FILE", help="the data that these files name")
    _add_import(parser)
    root = Path("datasets/benchmark")
    add("--root", type=Path, default=root, metavar="FOLDER", help="of the five sets (%(default)s)")
    sets = ["Set5", "Set14", "B100", "Urban100", "Manga109"]
    add("--sets", nargs="+", choices=sets, default=sets, help="(default: all)")
    add("--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="(2 3 4)")
    _add_report(parser)


def _warmup(parser: argparse.ArgumentParser) -> None:
    opt_help = "option file; one to train makes the backward pass ready, too (default: base ESC, x2, x3 and x4)"
    parser.add_argument("-opt", "--opt", metavar="FILE", help=opt_help)
    _add_import(parser)
    parser.add_argument("--size", metavar="HxW", default="128x128", help="of the LR image; default: 128x128")
    parser.add_argument("--device", choices=_DEVICES, default="auto")
    again_help = "try the Triton kernels on this GPU again, as after a failure"
    parser.add_argument("--again", action="store_true", help=again_help)


def _check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="option files (YAML)")
    add("-opt", "--opt", nargs="+", default=[], metavar="FILE", help="likewise")
    add("--schema", action="store_true", help="print the JSON schema of option files, for editors")
    force_help = "set options over those of the files"
    add("--force_yml", nargs="+", default=[], metavar="KEY[:KEY...]=VALUE", help=force_help)
    purpose_help = "what the files are for; auto: training if they have a training set"
    add("--for", dest="purpose", choices=("train", "test", "auto"), default="auto", help=purpose_help)
    add("--auto_resume", action="store_true", help="as the flag of basicsr train")
    _add_import(parser)
    add("--no-data", action="store_true", help="the files alone, not the data, weights and GPUs")
    add("--json", action="store_true", help="print the result as JSON")


def _doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-opt", "--opt", metavar="FILE", help="also this option file, its data, weights and folders")
    _add_import(parser)
    add("--json", action="store_true", help="the report as JSON, see docs/doctor.md")
    add("--no-test", action="store_true", help="do not compare backends with their references")
    timeout_help = "seconds for each self-test and for the option file (60); the first time kernels are compiled"
    add("--timeout", type=_seconds, default=60.0, metavar="S", help=timeout_help)


def _options(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    text = "list the option files"
    parts.add_parser("list", help=text, description=text)
    for name, text in (("show", "print an option file"), ("copy", "copy option files, to be changed")):
        part = parts.add_parser(name, help=text, description=text)
        part.add_argument("names", nargs="+", metavar="NAME", help="such as train_ESC_x4")
    to_help = "a file to write, or a folder (default: the current one)"
    part.add_argument("-o", "--output", type=Path, default=Path(), metavar="OUT", help=to_help)
    part.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _setup_training(parser: argparse.ArgumentParser) -> None:
    options_help = "options for pip install or uv pip install, after --, such as -- --quiet"
    parser.add_argument("options", nargs="*", metavar="OPTION", help=options_help)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be a number of seconds above 0")
    return seconds


def _add_weights(parser: argparse.ArgumentParser, output: str) -> None:
    """Which weights of a checkpoint to take, and whether to replace `output`."""
    _add_import(parser)
    parser.add_argument("--param-key", metavar="K", help="take the weights under K; default: params_ema, else params")
    parser.add_argument("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not determine")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {output} if it exists")


def _add_no_build(parser: argparse.ArgumentParser) -> None:
    no_build_help = "on a CPU, do not build the C++ operators, which are several times faster, where they are missing"
    parser.add_argument("--no-build", action="store_true", help=no_build_help)


def _add_report(parser: argparse.ArgumentParser) -> None:
    """The format of a report, and the file it is written to."""
    parser.add_argument("--format", choices=_TABLE_FORMATS, default="text", help="(%(default)s)")
    parser.add_argument("-o", "--report", type=Path, metavar="FILE", help="write to this file instead of printing")


def _add_import(parser: argparse.ArgumentParser) -> None:
    """Modules of the user's own package, in `args.imports`."""
    import_help = (
        "import this module of your own package first, such as hat.archs; looked for in the current folder, too"
    )
    parser.add_argument("--import", dest="imports", nargs="+", action="extend", metavar="MODULE", help=import_help)


_Add = Callable[[argparse.ArgumentParser], None]
_BENCHMARKS: Mapping[str, tuple[str, _Add]] = {
    "cost": ("Parameters, multiply-adds, latency and memory of networks, compared with the paper.", _benchmark_cost),
    "quality": ("Test networks with BasicSR's pipeline, and compare PSNR and SSIM with the paper.", _benchmark_quality),
    "data": ("Check benchmark data: images, names, sizes, and how LR images were made.", _benchmark_data),
}
_VERBS: Mapping[str, _Add] = {
    "train": _pipeline,
    "test": _pipeline,
    "prepare": _prepare,
    "convert": _convert,
    "export": _export,
    "publish": _publish,
    "upscale": _upscale,
    "benchmark": _benchmark,
    "warmup": _warmup,
    "check": _check,
    "doctor": _doctor,
    "options": _options,
    "setup-training": _setup_training,
}
