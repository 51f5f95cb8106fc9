"""Many files through a network: found, read ahead, enlarged and written behind, whatever becomes of any of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from esc_arch.errors import UserError
from esc_arch.printing import shown

from .image_reader import READABLE_SUFFIXES, DecodedImage, Pixels, read_image
from .image_writer import WRITABLE_SUFFIXES, EncodeSpec, encode_spec, write_image
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
    listed: Iterable[str],
    output: Path,
    *,
    suffix: str,
    ext: str,
    videos: Mapping[str, str] = MappingProxyType({}),
) -> list[UpscaleTask]:
    """What to enlarge, and where to.

    Files in folders keep their place below the folder; hidden ones do not count, nor do results of earlier runs.

    Args:
        inputs: files and folders; `-` stands for `listed`, lines that name a file or folder each.
        output: a folder; or a file, with a suffix, when the input is one file.
        suffix: what names of results end in, after an underscore; may be empty.
        ext: of `EXTENSIONS`.
        videos: what names of videos may end in, and what those of results then end in.

    Raises:
        UserError: there is nothing to enlarge, or `output` cannot be written to.
    """
    lines = [line.rstrip("\r\n") for line in listed if line.strip()] if "-" in inputs else []
    names = [line for name in inputs for line in (lines if name == "-" else [name])]
    single = len(names) == 1 and "-" not in inputs and not Path(names[0]).is_dir()
    is_file = output.suffix.lower() in WRITABLE_SUFFIXES and not output.is_dir()
    folder = output
    if single and output.suffix and not output.is_dir():
        source = Path(names[0])
        is_video = source.suffix.lower() in videos
        if not (is_video or is_file):
            allowed = " ".join(WRITABLE_SUFFIXES)
            raise UserError(f"{output}: not a format that can be written; allowed: {allowed}, or a folder.")
        tasks, folder = [UpscaleTask(source, output, is_video)], output.parent
    elif is_file:
        raise UserError(f"Several inputs need a folder: -o FOLDER, not {output}.")
    else:
        found = [each for name in names for each in _files(Path(name), output, {*READABLE_SUFFIXES, *videos})]
        tasks = []
        for source, place in found:
            own = source.suffix.lower()
            image_ending = f".{ext}" if ext != "auto" else own if own in WRITABLE_SUFFIXES else ".png"
            ending = videos.get(own, image_ending)
            name = f"{source.stem}{'_' * bool(suffix)}{suffix}{source.suffix if ending == own else ending}"
            tasks.append(UpscaleTask(source, output / place / name, own in videos))
    if not tasks:
        raise UserError(
            f"{', '.join(names) or 'The list of inputs'}: no image found ({' '.join(READABLE_SUFFIXES)}; hidden files "
            "do not count)."
        )
    if not any(task.source.exists() for task in tasks):
        raise UserError(f"{', '.join(str(task.source) for task in tasks[:5])}: no such file or folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}. Choose another -o.") from error
    return _without_conflicts(tasks, {Path(name) for name in names})


def _files(path: Path, output: Path, known: Collection[str]) -> Iterator[tuple[Path, Path]]:
    """The file, or the images and videos below the folder, each with its folder's place there."""
    if not path.is_dir():
        yield path, Path()
        return
    results = output.resolve()
    for parent, folders, names in os.walk(path):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != results)
        for file in (here / name for name in sorted(names) if not name.startswith(".")):
            if file.suffix.lower() in known:
                yield file, here.relative_to(path)


def _without_conflicts(tasks: list[UpscaleTask], given: set[Path]) -> list[UpscaleTask]:
    """Tasks of which none writes over an input, or over another's result.

    What was found in a folder and has the name of another's result is that result, of an earlier run.
    """
    targets = {task.target.resolve() for task in tasks if task.target.resolve() != task.source.resolve()}
    tasks = [task for task in tasks if task.source in given or task.source.resolve() not in targets]
    sources = {task.source.resolve() for task in tasks}
    first: dict[Path, Path] = {}
    checked = []
    for task in tasks:
        target, problem = task.target.resolve(), None
        earlier = first.setdefault(target, task.source)
        if earlier is not task.source and earlier.resolve() == task.source.resolve():
            continue  # named twice
        if target in sources:
            problem = f"would be written over the input {task.target}. Choose another -o, or a --suffix."
        elif earlier is not task.source:
            problem = f"would be written to {task.target}, as {earlier} is. Use --ext auto, or another -o for it."
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

    What is there already is skipped: files are written whole or not at all. A file that fails is reported, and the
    rest is done. When this is interrupted, what is computed is still written.
    """
    run = _Run(upscaler, options, report)
    waiting = [task for task in tasks if run.is_to_do(task)]
    groups = run.groups([task for task in waiting if not task.is_video])
    if options.settings.max_memory is None:
        overlapped(groups, run.enlarge, run.write, WRITERS)
    else:  # whatever waits would take memory
        for group in groups:
            run.enlarge(group)
    for task in waiting:
        if task.is_video and upscale_video is not None:
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
            if not task.target.exists() or self.options.overwrite:
                return True
            self.report.add_skipped(task)
        return False

    @contextmanager
    def reporting(self, task: UpscaleTask) -> Iterator[None]:
        """What goes wrong in the block is the task's failure, and does not end the run."""
        try:
            yield
        except Exception as error:
            line = " ".join(f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{error}".split())
            self.report.add_failed(task, line if line.startswith(shown(task.source)) else f"{task.source}: {line}")

    def groups(self, tasks: Sequence[UpscaleTask]) -> Iterator[list[_Work]]:
        """Images that run together: neighbours of one size."""
        for size, neighbours in groupby(self._read(tasks), lambda work: work.image.pixels.shape[:2]):
            while group := list(islice(neighbours, self.options.batch_of(self.upscaler, *size))):
                yield group

    def _read(self, tasks: Sequence[UpscaleTask]) -> Iterator[_Work]:
        """Images with what they become."""
        settings = self.options.settings
        for task in tasks:
            with self.reporting(task):
                image = read_image(task.source)
                spec = encode_spec(
                    task.target,
                    image,
                    enlarged_size(self.upscaler, image.pixels, settings),
                    quality=self.options.quality,
                    lossless=self.options.lossless,
                    max_memory=settings.max_memory,
                )
                for note in (*image.notes, *spec.notes):
                    self.report.note(f"{task.source}: {note}.")
                yield _Work(task, image, spec)

    def enlarge(self, group: list[_Work]) -> list[tuple[_Work, list[Pixels]]]:
        """Enlarge images of one size; gives what is still to be written. Large results are written as they come."""
        settings, found = self.options.settings, []
        together: Sequence[Pixels] = ()
        if len(group) > 1:
            pixels, dtypes = [work.image.pixels for work in group], [work.spec.dtype for work in group]
            with suppress(Exception):  # whichever it was that failed, the others need not
                together = enlarge_many(self.upscaler, pixels, settings, dtypes)
        for index, work in enumerate(group):
            with self.reporting(work.task):
                work.task.target.parent.mkdir(parents=True, exist_ok=True)
                spec = work.spec
                rows: Iterable[Pixels] = (
                    [together[index]]
                    if together
                    else enlarge_pixels(
                        self.upscaler,
                        work.image.pixels,
                        settings,
                        dtype=spec.dtype,
                        scratch=work.task.target.parent,
                        progress=self.report.progress,
                    )
                )
                if settings.max_memory is not None or spec.height * spec.width * spec.channels > LARGEST_WAITING:
                    self.write([(work, rows)])
                else:
                    found.append((work, list(rows)))
        return found

    def write(self, images: Sequence[tuple[_Work, Iterable[Pixels]]]) -> None:
        for work, rows in images:
            with self.reporting(work.task):
                write_image(work.task.target, work.spec, rows)
                self.report.add_done(work.task, work.spec)
