"""`basicsr upscale`: pictures and videos enlarged by the network of a checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from esc_arch.errors import FAULT, UserError
from esc_arch.tools.upscale.batch import EXTENSIONS, Options, Summary, Task, find_tasks, upscale_files
from esc_arch.tools.upscale.image_writer import Form
from esc_arch.tools.upscale.memory import parse_memory
from esc_arch.tools.upscale.network import load
from esc_arch.tools.upscale.upscaling import ALPHAS, Settings

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Enlarge pictures and videos by the network of a checkpoint."

#: Names of failed files that the last line has room for.
NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to enlarge, by what, how, and where to."""
    parser.add_argument(
        "-i", "--input", nargs="+", required=True, metavar="INPUT",
        help="files, and folders with all folders in them; - reads a list of them, a line each",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder, or a file when the input is one")
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="WEIGHTS", help=".pth or .safetensors")
    parser.add_argument("-s", "--outscale", type=float, metavar="S", help="enlarge by S; default: as the network does")
    parser.add_argument(
        "-t", "--tile", type=int, default=0, metavar="N", help="parts of at most N pixels, with the same result"
    )
    parser.add_argument("--tile_pad", type=int, metavar="N", help="accepted without effect: parts need no overlap")
    parser.add_argument("--pre_pad", type=int, default=0, metavar="N", help="pixels added at each side, then cropped")
    parser.add_argument("--max-memory", metavar="SIZE", help="such as 2G: in parts that fit, with the same result")
    parser.add_argument("--fp32", action="store_true", help="full precision on GPUs, too; CPUs always have it")
    parser.add_argument("-g", "--gpu-id", type=int, metavar="N", help="this GPU; -1 is the CPU; default: the first GPU")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures of one size that run together")
    parser.add_argument("--alpha_upsampler", choices=ALPHAS, default="network", help="for alpha; default: network")
    parser.add_argument("--suffix", default="out", help="results are NAME_SUFFIX; default: out; '' for none")
    parser.add_argument("--ext", choices=EXTENSIONS, default="auto", help="format of results; auto: the input's")
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP, 1 to 100; default: 95")
    parser.add_argument("--lossless", action="store_true", help="WebP without loss")
    parser.add_argument("--codec", metavar="NAME", help="of videos, an encoder of FFmpeg's; default: x264, VP9 in webm")
    parser.add_argument("--crf", type=float, metavar="Q", help="quality of videos, from 0, the best; default: high")
    parser.add_argument("--pixel-format", metavar="NAME", help="of videos, by FFmpeg's name; default: as the source's")
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing results (default: skip)")
    parser.add_argument("--window", type=int, metavar="W", help="window_size, which weights of ESCRIB do not say")


def run(args: argparse.Namespace) -> int:
    """Enlarge; returns the exit status: 0, or 1 when some files failed.

    Raises:
        UserError: nothing was enlarged, because an option or the checkpoint cannot be used, there is no input, or
            the output cannot be written to.
    """
    options = _options(args)
    device = _device(args.gpu_id)
    upscaler = load(args.model, device=device, precision="fp32" if args.fp32 else "auto", window_size=args.window)
    options.settings.asked(upscaler)
    tasks = find_tasks(args.input, sys.stdin, args.output, suffix=args.suffix, ext=args.ext)
    print(upscaler)
    for assumption in upscaler.assumptions:
        print(f"  {assumption}")
    report = _Progress(len(tasks))
    logger, handler = logging.getLogger("esc_arch"), _Warnings(report)
    logger.addHandler(handler)
    try:
        summary = upscale_files(upscaler, tasks, options, report)
    finally:
        logger.removeHandler(handler)
        report.close()
    print(_last_line(summary))
    return FAULT if summary.failed else 0


def _options(args: argparse.Namespace) -> Options:
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: give a number of pictures, 1 or more.")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: give a number from 1 to 100.")
    if "/" in args.suffix or "\\" in args.suffix:
        raise UserError(f"--suffix {args.suffix}: a suffix is a part of a name, not of a path.")
    settings = Settings(
        scale=args.outscale,
        tile=args.tile,
        pre_pad=args.pre_pad,
        max_memory=None if args.max_memory is None else parse_memory(args.max_memory),
        alpha=args.alpha_upsampler,
    )
    video = {"codec": args.codec, "crf": args.crf, "pixel_format": args.pixel_format}
    chosen = {name: value for name, value in video.items() if value is not None}
    return Options(settings, args.quality, args.lossless, args.batch, args.overwrite, chosen)


def _device(gpu: int | None) -> str:
    if gpu is None:
        return "auto"
    if gpu < 0:
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count:
        raise UserError(
            f"-g {gpu}: PyTorch finds {count} GPUs here, numbered from 0. Leave -g away, or -g -1: the CPU."
        )
    return f"cuda:{gpu}"


def _last_line(summary: Summary) -> str:
    line = f"{len(summary.done)} done, {len(summary.skipped)} skipped (there already), {len(summary.failed)} failed"
    names = ", ".join(_shown(str(path)) for path in summary.failed[:NAMED])
    more = f" and {len(summary.failed) - NAMED} more" if len(summary.failed) > NAMED else ""
    return f"{line}: {names}{more}" if names else line


def _shown(text: str) -> str:
    """What names of files contain must neither end a line nor steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


class _Progress:
    """A bar with the time that is left on a terminal, a line for each file elsewhere."""

    def __init__(self, total: int) -> None:
        self.finished, self.at_terminal = 0, sys.stderr.isatty()
        layout = "{percentage:3.0f}% |{bar}| {n:.0f}/{total} {elapsed} < {remaining}"
        self.bar = tqdm(total=total, bar_format=layout, disable=not self.at_terminal)

    def done(self, task: Task, form: Form | None) -> None:
        size = f" ({form.width} x {form.height})" if form else ""
        self._next(f"{task.source} -> {task.target}{size}")

    def skipped(self, task: Task) -> None:
        self._next(f"{task.source}: skipped, {task.target} is there")

    def failed(self, task: Task, message: str) -> None:
        self._next()
        self.warn(message)

    def remark(self, task: Task, message: str) -> None:
        self.warn(message)

    def warn(self, message: str) -> None:
        self._say(f"basicsr upscale: {message}", error=True)

    def progress(self, part: float) -> None:
        self._show(self.finished + min(part, 1.0))

    def close(self) -> None:
        self.bar.close()

    def _next(self, line: str | None = None) -> None:
        self.finished += 1
        self._show(self.finished)
        if line is not None and not self.at_terminal:
            self._say(line)

    def _show(self, number: float) -> None:
        # A file may end while the next is half done
        self.bar.update(max(number - self.bar.n, 0))

    def _say(self, line: str, *, error: bool = False) -> None:
        with self.bar.external_write_mode(sys.stderr if error else sys.stdout, nolock=False):
            print(_shown(line), file=sys.stderr if error else sys.stdout, flush=True)


class _Warnings(logging.Handler):
    """Shows warnings of the package, such as of memory that ran out, without disturbing the bar."""

    def __init__(self, report: _Progress) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.warn(record.getMessage())
