"""`basicsr upscale`: images and videos enlarged by the network of a checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial

import torch
from tqdm import tqdm

from esc_arch.errors import FAULT, UserError
from esc_arch.ops.cpu import background
from esc_arch.printing import shown
from esc_arch.tools.upscale.batch import BatchOptions, BatchReport, UpscaleTask, find_tasks, upscale_files
from esc_arch.tools.upscale.image_writer import EncodeSpec
from esc_arch.tools.upscale.memory import parse_memory
from esc_arch.tools.upscale.other_networks import load_any
from esc_arch.tools.upscale.upscaling import Settings
from esc_arch.tools.video import upscaling as video

__all__ = ["run"]

#: Names of failed files that the last line has room for.
NAMED = 20


def run(args: argparse.Namespace) -> int:
    """Enlarge; returns the exit status: 0, or 1 when some files failed.

    Raises:
        UserError: nothing was enlarged, because of an invalid option or checkpoint, or because there is no input or
            no output that can be written to.
    """
    options = _options(args)
    settings = options.settings
    precision = "fp32" if args.fp32 else "auto"
    upscaler = load_any(args.model, device=_device(args.gpu_id), precision=precision, window_size=args.window)
    settings.asked(upscaler)
    tasks, left_out = find_tasks(
        args.input,
        _listed() if "-" in args.input else [],
        args.output,
        suffix=args.suffix,
        ext=args.ext,
        overwrite=args.overwrite,
        videos=video.RESULT_SUFFIXES,
    )
    print(upscaler, *upscaler.assumptions, sep="\n  ")
    progress = _Progress(len(tasks))
    if upscaler.device.type == "cpu" and not args.no_build:
        background.start_build(progress.note)
    upscale_video = partial(
        video.upscale_video,
        upscaler,
        scale=settings.scale,
        batch=options.batch,
        overwrite=options.overwrite,
        codec=args.codec,
        crf=args.crf,
        pixel_format=args.pixel_format,
        progress=progress.progress,
        max_memory=settings.max_memory,
    )
    logger = logging.getLogger("esc_arch")
    logger.addHandler(progress)
    try:
        upscale_files(upscaler, tasks, options, progress, upscale_video)
    finally:
        logger.removeHandler(progress)
        progress.bar.close()
    place = f"; results: {args.output}" * bool(progress.done or progress.skipped)
    print(_last_line(progress) + shown(left_out + place))
    return FAULT if progress.failed else 0


def _options(args: argparse.Namespace) -> BatchOptions:
    if args.batch is not None and not 1 <= args.batch <= 10_000:
        raise UserError(f"--batch {args.batch}: give a number of images, from 1 to 10000.")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: give a number from 1 to 100.")
    if "/" in args.suffix or "\\" in args.suffix:
        raise UserError(f"--suffix {args.suffix}: a suffix is a part of a name, not of a path.")
    memory = None if args.max_memory is None else parse_memory(args.max_memory)
    settings = Settings(args.outscale, args.tile, args.pre_pad, memory, args.alpha_upsampler)
    return BatchOptions(settings, args.quality, args.lossless, args.batch, args.overwrite)


def _listed() -> list[str]:
    """Names from standard input, of any bytes: one a line, or each before a NUL, as `find -print0` writes them."""
    if sys.stdin is None:
        raise UserError("-i -: standard input is closed. Send it a list of names, or name the files.")
    try:
        text = os.fsdecode(sys.stdin.buffer.read())
    except OSError as error:
        raise UserError(f"-i -: standard input cannot be read: {error.strerror}.") from error
    lines = text.split("\0") if "\0" in text else text.replace("\r\n", "\n").split("\n")
    return [line for line in lines if line.strip()]


def _device(gpu: int | None) -> str:
    if gpu is None:
        return "auto"
    if gpu < 0:
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count:
        raise UserError(f"-g {gpu}: PyTorch finds {count} GPUs here, numbered from 0. Omit -g, or use the CPU: -g -1.")
    return f"cuda:{gpu}"


def _last_line(report: BatchReport) -> str:
    line = f"{len(report.done)} done, {len(report.skipped)} skipped (there already), {len(report.failed)} failed"
    names = ", ".join(shown(path) for path in report.failed[:NAMED])
    more = f" and {len(report.failed) - NAMED} more" if len(report.failed) > NAMED else ""
    return f"{line}: {names}{more}" if names else line


class _Progress(BatchReport, logging.Handler):
    """A bar with the time that is left on a terminal, a line for each file elsewhere; warnings of the package."""

    def __init__(self, total: int) -> None:
        BatchReport.__init__(self)
        logging.Handler.__init__(self, logging.WARNING)
        self.at_terminal = sys.stderr.isatty()
        layout = "{percentage:3.0f}% |{bar}| {n:.0f}/{total} {elapsed} < {remaining}"
        self.bar = tqdm(total=total, bar_format=layout, disable=not self.at_terminal)

    def add_done(self, task: UpscaleTask, spec: EncodeSpec | None) -> None:
        super().add_done(task, spec)
        self._next(f"{task.source} -> {task.target}" + (f" ({spec.width} x {spec.height})" if spec else ""))

    def add_skipped(self, task: UpscaleTask) -> None:
        super().add_skipped(task)
        self._next(f"{task.source}: skipped, {task.target} is there")

    def add_failed(self, task: UpscaleTask, message: str) -> None:
        super().add_failed(task, message)
        self.progress(0)
        self.note(message)

    def note(self, message: str) -> None:
        self._say(f"basicsr upscale: {message}", error=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())

    def progress(self, part: float) -> None:
        # A file may end while the next is half done
        finished = len(self.done) + len(self.skipped) + len(self.failed)
        self.bar.update(max(finished + min(part, 1.0) - self.bar.n, 0))

    def _next(self, line: str) -> None:
        self.progress(0)
        if not self.at_terminal:
            self._say(line)

    def _say(self, line: str, *, error: bool = False) -> None:
        with self.bar.external_write_mode(sys.stderr if error else sys.stdout, nolock=False):
            print(shown(line), file=sys.stderr if error else sys.stdout, flush=True)
