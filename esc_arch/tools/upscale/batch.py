"""Many files through a network: found, read ahead, enlarged and written behind, whatever becomes of any of them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from esc_arch.atomic_io import system_fault
from esc_arch.errors import UserError
from esc_arch.ops import cpu
from esc_arch.printing import shown

from .image_reader import READABLE_SUFFIXES, DecodedImage, Pixels, inspect_image, is_animated, read_image
from .image_writer import WRITABLE_SUFFIXES, EncodeSpec, encode_spec, write_image
from .memory import is_out_of_memory
from .network import Upscaler
from .stages import overlapped
from .upscaling import Settings, enlarge_many, enlarge_pixels, enlarged_size

__all__ = ["EXTENSIONS", "BatchOptions", "BatchReport", "UpscaleTask", "find_tasks", "upscale_files"]

#: What `--ext` may be; auto is the input's own.
EXTENSIONS = ("auto", "png", "jpg", "webp", "tiff")
#: Files that are written while the next image is computed, and the most values of a result that waits for that.
WRITERS, LARGEST_WAITING = 2, 2**29


@dataclass(frozen=True)
class UpscaleTask:
    """A file to enlarge, and where the result goes; `problem` says why it cannot go there."""

    source: Path
    target: Path
    is_video: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class BatchOptions:
    """How images are run; `batch` of equal size run together, None for what suits the device."""

    settings: Settings = field(default_factory=Settings)
    quality: int = 95
    lossless: bool = False
    batch: int | None = None
    overwrite: bool = False

    def batch_of(self, upscaler: Upscaler, height: int, width: int) -> int:
        """How many images of this size run together."""
        if self.settings.tile or self.settings.max_memory is not None:
            return 1
        return self.batch or upscaler.batch_size(height, width)


class BatchReport:
    """What became of the files. It says nothing; subclasses do, in whichever thread they are called."""

    def __init__(self) -> None:
        self.done: list[Path] = []
        self.skipped: list[Path] = []
        self.failed: list[Path] = []

    def add_done(self, task: UpscaleTask, spec: EncodeSpec | None) -> None:
        self.done.append(task.source)

    def add_skipped(self, task: UpscaleTask) -> None:
        self.skipped.append(task.source)

    def add_failed(self, task: UpscaleTask, message: str) -> None:
        self.failed.append(task.source)

    def note(self, message: str) -> None: ...
    def progress(self, part: float) -> None: ...


def find_tasks(
    inputs: Sequence[str],
    listed: Sequence[str],
    output: Path,
    *,
    suffix: str,
    ext: str,
    overwrite: bool = False,
    videos: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[UpscaleTask], str]:
    """What to enlarge and where to; and, to end a line, what else is in the folders.

    Files in folders keep their place below the folder; hidden ones do not count, nor do results of earlier runs:
    files in the output folder, and those named as another's result, if there is a suffix.

    Args:
        inputs: files and folders; `-` stands for those that are `listed`.
        output: a folder; or a file, with a suffix, when the input is one file.
        suffix: what names of results end in, after an underscore; may be empty.
        ext: of `EXTENSIONS`.
        overwrite: True if results of earlier runs are to be replaced.
        videos: what names of videos may end in, and what those of results then end in.

    Raises:
        UserError: there is nothing to enlarge, or `output` cannot be written to.
    """
    names = [each for name in inputs for each in (listed if name == "-" else [name])]
    given = {Path(name) for name in names}
    single = len(names) == 1 and "-" not in inputs and not os.path.isdir(names[0])
    is_file = output.suffix.lower() in WRITABLE_SUFFIXES and not os.path.isdir(output)
    folder, others = output, Counter[str]()
    if single and output.suffix and not os.path.isdir(output):
        source = Path(names[0])
        is_video = _is_video(source, videos) or (
            output.suffix.lower() in videos.values() and source.suffix.lower() not in READABLE_SUFFIXES
        )
        if not (is_video or is_file):
            allowed = " ".join(WRITABLE_SUFFIXES)
            raise UserError(f"{output}: not a format that can be written; allowed: {allowed}, or a folder.")
        tasks, folder = [UpscaleTask(source, output, is_video)], output.parent
    elif is_file:
        raise UserError(f"Several inputs need a folder: -o FOLDER, not {output}.")
    else:
        tasks, known = [], {*READABLE_SUFFIXES, *videos}
        for source, place, problem in (each for name in names for each in _files(Path(name), output)):
            own, is_video = source.suffix.lower(), _is_video(source, videos)
            if problem is None and own not in known and source not in given:
                others["link to a folder" if os.path.isdir(source) else own or "without suffix"] += 1
                continue
            image_ending = f".{ext}" if ext != "auto" else own if own in WRITABLE_SUFFIXES else ".png"
            ending = videos[own] if is_video else image_ending
            name = f"{source.stem}{'_' * bool(suffix)}{suffix}{source.suffix if ending == own else ending}"
            tasks.append(UpscaleTask(source, output / place / name, is_video, problem))
    left_out = f"; left out: {', '.join(f'{others[kind]} {kind}' for kind in sorted(others))}" if others else ""
    if not tasks:
        raise UserError(
            f"{', '.join(names) or 'The list of inputs'}: no image found ({' '.join(READABLE_SUFFIXES)}; hidden files "
            f"do not count{left_out})."
        )
    if not any(os.path.lexists(task.source) for task in tasks):
        raise UserError(f"{', '.join(str(task.source) for task in tasks[:5])}: no such file or folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".esc_arch_") as probe:
            ignores_case = os.path.exists(folder / Path(probe.name).name.upper())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}. Choose another -o.") from error
    kept = {task.source for task in tasks} if not suffix else given
    return _without_conflicts(tasks, kept, overwrite, ignores_case), left_out


def _is_video(path: Path, videos: Mapping[str, str]) -> bool:
    """By the suffix; a GIF of one frame is an image."""
    suffix = path.suffix.lower()
    return suffix in videos and (suffix != ".gif" or is_animated(path))


def _files(path: Path, output: Path) -> Iterator[tuple[Path, Path, str | None]]:
    """The file, or those below the folder, each with its folder's place there, and why it cannot be read."""
    if not os.path.isdir(path):
        yield path, Path(), None
        return
    results, closed = os.path.realpath(output), list[OSError]()
    for parent, folders, names in os.walk(path, onerror=closed.append):
        here = Path(parent)
        # Links may lead back to where they are; they are counted with the files
        names += [name for name in folders if os.path.islink(here / name)]
        folders[:] = sorted(n for n in folders if not n.startswith(".") and os.path.realpath(here / n) != results)
        for file in (here / name for name in sorted(names) if not name.startswith(".")):
            yield file, here.relative_to(path), None
    for error in closed:
        yield Path(error.filename), Path(), f"cannot be read: {error.strerror}. Get the permission, or take it out."


def _without_conflicts(
    tasks: list[UpscaleTask], kept: set[Path], overwrite: bool, ignores_case: bool
) -> list[UpscaleTask]:
    """Tasks of which none writes over an input, or over another's result.

    What has the name of another's result and is not `kept` is that result, of an earlier run, and no input; as it may
    be the user's as well, it is not written over either.
    """

    def place(path: Path) -> str:
        name = os.path.realpath(path)
        return name.casefold() if ignores_case else name

    def identity(path: Path) -> object:  # the same for all names of a file
        try:
            found = os.stat(path)
            return found.st_dev, found.st_ino
        except OSError:
            return os.path.realpath(path)

    targets = {identity(task.target) for task in tasks if identity(task.target) != identity(task.source)}
    inputs = [task for task in tasks if task.source in kept or identity(task.source) not in targets]
    sources = {identity(task.source) for task in (tasks if overwrite else inputs)}
    first: dict[str, Path] = {}
    checked = [task for task in inputs if task.problem is not None]
    for task in (task for task in inputs if task.problem is None):
        problem, earlier = None, first.setdefault(place(task.target), task.source)
        if earlier is not task.source and identity(earlier) == identity(task.source):
            continue  # named twice
        if identity(task.target) in sources:
            problem = f"would be written over the input {task.target}. Choose another -o, or a --suffix."
        elif earlier is not task.source:
            problem = f"would be written to {task.target}, as {earlier} is. Use another -o for it."
        checked.append(replace(task, problem=problem))
    return checked


class _Work(NamedTuple):
    """An image on its way."""

    task: UpscaleTask
    image: DecodedImage
    spec: EncodeSpec


def upscale_files(
    upscaler: Upscaler,
    tasks: Sequence[UpscaleTask],
    options: BatchOptions,
    report: BatchReport,
    upscale_video: Callable[[Path, Path], None] | None = None,
) -> None:
    """Enlarge files, images first: the next are read, and the last written, while one is computed.

    What is there already is skipped, if it is whole and of the right size, however it came there. A file that fails is
    reported, and the rest is done. When this is interrupted, what is computed is still written.
    """
    run = _Run(upscaler, options, report)
    groups = run.groups([task for task in tasks if not task.is_video])
    if options.settings.max_memory is None:
        overlapped(groups, run.enlarge, run.write, WRITERS)
    else:  # whatever waits would take memory
        for group in groups:
            run.enlarge(group)
    for task in tasks:
        if task.is_video and upscale_video is not None and run.is_to_do(task):
            with run.reporting(task):
                task.target.parent.mkdir(parents=True, exist_ok=True)
                upscale_video(task.source, task.target)
                report.add_done(task, None)


class _Run(NamedTuple):
    """The steps of `upscale_files`."""

    upscaler: Upscaler
    options: BatchOptions
    report: BatchReport

    def is_to_do(self, task: UpscaleTask) -> bool:
        with self.reporting(task):
            if task.problem is not None:
                raise UserError(task.problem)
            if self.options.overwrite or not os.path.exists(task.target):
                return True
            if not task.is_video:
                self._check_result(task)
            self.report.add_skipped(task)
        return False

    def _check_result(self, task: UpscaleTask) -> None:
        """UserError if what is there cannot be the whole result."""
        wanted = enlarged_size(self.upscaler, inspect_image(task.source)[0], self.options.settings)
        try:
            size, is_whole = inspect_image(task.target)
            problem = "it is cut off" * (not is_whole)
            if sorted(size) != sorted(wanted):  # a side may have become the other
                problem = f"of {size[1]} x {size[0]} pixels instead of {wanted[1]} x {wanted[0]}"
        except UserError as error:
            problem = str(error).removeprefix(f"{task.target}: ").partition(". ")[0].rstrip(".")
        if problem:
            raise UserError(f"{task.target} is there, but {problem}. Use --overwrite to replace it, or another -o.")

    @contextmanager
    def reporting(self, task: UpscaleTask) -> Iterator[None]:
        """What goes wrong in the block is the task's failure, and does not end the run."""
        try:
            yield
        except Exception as error:
            fault = system_fault(error) if isinstance(error, OSError) else None
            if is_out_of_memory(error):
                fault = "the memory ran out. Free some, or use smaller parts: --tile or --max-memory."
            name = "" if fault or isinstance(error, UserError) else f"{type(error).__name__}: "
            line = " ".join(f"{name}{fault or error}".split())
            self.report.add_failed(task, line if line.startswith(shown(task.source)) else f"{task.source}: {line}")

    def groups(self, tasks: Sequence[UpscaleTask]) -> Iterator[list[_Work]]:
        """Images that run together: neighbours of one size."""
        for size, neighbours in groupby(self._read(tasks), lambda work: work.image.pixels.shape[:2]):
            while group := list(islice(neighbours, self.options.batch_of(self.upscaler, *size))):
                yield group

    def _read(self, tasks: Sequence[UpscaleTask]) -> Iterator[_Work]:
        """Images with what they become."""
        settings = self.options.settings
        for task in filter(self.is_to_do, tasks):
            with self.reporting(task):
                image = read_image(task.source)
                size = enlarged_size(self.upscaler, image.pixels.shape, settings)
                quality, lossless, memory = self.options.quality, self.options.lossless, settings.max_memory
                spec = encode_spec(task.target, image, size, quality=quality, lossless=lossless, max_memory=memory)
                for note in (*image.notes, *spec.notes):
                    self.report.note(f"{task.source}: {note}.")
                yield _Work(task, image, spec)

    def enlarge(self, group: list[_Work]) -> list[tuple[_Work, list[Pixels]]]:
        """Enlarge images of one size; gives what is still to be written. Large results are written as they come."""
        settings, progress, found = self.options.settings, self.report.progress, []
        cpu.look_again()
        together: Sequence[Pixels] = ()
        if len(group) > 1:
            pixels, dtypes = [work.image.pixels for work in group], [work.spec.dtype for work in group]
            with suppress(Exception):  # whichever it was that failed, the others need not
                together = enlarge_many(self.upscaler, pixels, settings, dtypes)
        for index, work in enumerate(group):
            with self.reporting(work.task):
                spec, folder = work.spec, work.task.target.parent
                folder.mkdir(parents=True, exist_ok=True)
                alone = partial(enlarge_pixels, self.upscaler, work.image.pixels, settings, dtype=spec.dtype)
                rows: Iterable[Pixels] = [together[index]] if together else alone(scratch=folder, progress=progress)
                if settings.max_memory is not None or spec.height * spec.width * spec.channels > LARGEST_WAITING:
                    self.write([(work, rows)])
                else:
                    found.append((work, list(rows)))
        return found

    def write(self, images: Sequence[tuple[_Work, Iterable[Pixels]]]) -> None:
        for work, rows in images:
            with self.reporting(work.task):
                if not self.is_to_do(work.task):  # another run has been faster
                    continue
                write_image(work.task.target, work.spec, rows)
                self.report.add_done(work.task, work.spec)
