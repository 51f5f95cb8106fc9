"""Many files through a network: found, read ahead, enlarged and written behind, whatever becomes of any of them."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from esc_arch.errors import UserError

from .image_reader import PICTURE_SUFFIXES, Picture, Pixels, read_picture
from .image_writer import SUFFIXES, Form, PictureFile, form_of
from .network import Upscaler
from .upscaling import Rows, Settings, enlarge_many, enlarge_pixels, enlarged_size

__all__ = ["EXTENSIONS", "Options", "Report", "Summary", "Task", "find_tasks", "upscale_files"]

#: What `--ext` may be; auto is the input's own.
EXTENSIONS = ("auto", "png", "jpg", "webp", "tiff")
#: Images that run together on a GPU by themselves: as many as have so many pixels, and at most so many.
BATCH_PIXELS, BATCH_LARGEST = 2**18, 16
#: Files that are written while the next image is computed.
WRITERS = 2


@dataclass(frozen=True)
class Task:
    """A file to enlarge, and where the result goes; `problem` says why that cannot be."""

    source: Path
    target: Path
    problem: str | None = None


@dataclass(frozen=True)
class Options:
    """How files are run.

    Attributes:
        settings: how images are enlarged.
        quality, lossless: of what is written, see `Form`.
        batch: images of equal size that run together; None for what suits the device.
        overwrite: replace existing results.
        video: codec, crf and pixel_format of `upscale_video`, where they are chosen.
    """

    settings: Settings = field(default_factory=Settings)
    quality: int = 95
    lossless: bool = False
    batch: int | None = None
    overwrite: bool = False
    video: Mapping[str, Any] = field(default_factory=dict)

    def batch_of(self, upscaler: Upscaler, height: int, width: int) -> int:
        """How many images of this size run together."""
        if self.settings.tile or self.settings.max_memory is not None:
            return 1
        if self.batch is not None:
            return self.batch
        return max(1, min(BATCH_LARGEST, BATCH_PIXELS // (height * width))) if upscaler.device.type == "cuda" else 1


@dataclass
class Summary:
    """What became of the files."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[Path] = field(default_factory=list)


class Report(Protocol):
    """Is told what happens."""

    def done(self, task: Task, form: Form | None) -> None: ...
    def skipped(self, task: Task) -> None: ...
    def failed(self, task: Task, message: str) -> None: ...
    def remark(self, task: Task, message: str) -> None: ...
    def progress(self, part: float) -> None: ...


def find_tasks(inputs: Sequence[str], listed: Iterable[str], output: Path, *, suffix: str, ext: str) -> list[Task]:
    """What to enlarge, and where to.

    Files in folders keep their place below the folder; hidden ones do not count, nor do results of earlier runs.

    Args:
        inputs: files and folders; `-` stands for `listed`.
        listed: lines that name a file or folder each.
        output: a folder; or a file, with a suffix, when the input is one file.
        suffix: what names of results end in, after an underscore; may be empty.
        ext: of `EXTENSIONS`.

    Raises:
        UserError: there is nothing to enlarge, or `output` cannot be written to.
    """
    names = [line for name in inputs for line in (_lines(listed) if name == "-" else [name])]
    single = len(names) == 1 and "-" not in inputs and not Path(names[0]).is_dir()
    if single and output.suffix and not output.is_dir():
        source = Path(names[0])
        if not (_is_video(source) or output.suffix.lower() in SUFFIXES):
            raise UserError(f"{output}: no format that is written; allowed: {' '.join(SUFFIXES)}, or a folder.")
        tasks = [Task(source, output)]
        folder = output.parent
    else:
        if output.suffix.lower() in SUFFIXES and not output.is_dir():
            raise UserError(f"{output}: a folder is needed, since the input is not one file. Give its name to -o.")
        tasks = [
            Task(source, output / place / _result_name(source, suffix, ext))
            for name in names
            for source, place in _files(Path(name), output)
        ]
        folder = output
    if not tasks:
        raise UserError(
            f"{', '.join(names) or 'The list of inputs'}: no picture found ({' '.join(PICTURE_SUFFIXES)}; hidden files "
            "do not count)."
        )
    if not any(task.source.exists() for task in tasks):
        raise UserError(f"{', '.join(str(task.source) for task in tasks[:5])}: not there. Give pictures or folders.")
    _check_writable(folder)
    return _without_conflicts(tasks, {Path(name) for name in names})


def _lines(listed: Iterable[str]) -> list[str]:
    return [line.rstrip("\r\n") for line in listed if line.strip()]


def _is_video(path: Path) -> bool:
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return False
    from esc_arch.tools.video.upscaling import is_video

    return is_video(path)


def _files(path: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """The file, or the pictures and videos below the folder, each with its folder's place there."""
    if not path.is_dir():
        yield path, Path()
        return
    results = output.resolve()
    for parent, folders, names in os.walk(path):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != results)
        for name in sorted(names):
            known = Path(name).suffix.lower() in PICTURE_SUFFIXES or _is_video(here / name)
            if known and not name.startswith("."):
                yield here / name, here.relative_to(path)


def _result_name(source: Path, suffix: str, ext: str) -> str:
    if _is_video(source):
        from esc_arch.tools.video.output import CONTAINERS

        # Matroska takes every codec and stream that the others have
        ending = source.suffix if source.suffix.lower() in CONTAINERS else ".mkv"
    elif ext == "auto":
        ending = source.suffix if source.suffix.lower() in SUFFIXES else ".png"
    else:
        ending = f".{ext}"
    return f"{source.stem}{f'_{suffix}' if suffix else ''}{ending}"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}. Choose another -o.") from error


def _without_conflicts(tasks: list[Task], given: set[Path]) -> list[Task]:
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
        checked.append(Task(task.source, task.target, problem))
    return checked


@dataclass
class _Work:
    """A picture on its way."""

    task: Task
    picture: Picture
    form: Form


def upscale_files(upscaler: Upscaler, tasks: Sequence[Task], options: Options, report: Report) -> Summary:
    """Enlarge files: the next are read, and the last written, while one is computed.

    What is there already is skipped: files are written whole or not at all. A file that fails is reported, and the
    rest is done. When this is interrupted, what is computed is still written.
    """
    run = _Run(upscaler, options, report)
    waiting = [task for task in tasks if run.is_to_do(task)]
    run.pictures([task for task in waiting if not _is_video(task.source)])
    for task in waiting:
        if _is_video(task.source):
            run.video(task)
    return run.summary


class _Run:
    """The state of `upscale_files`."""

    def __init__(self, upscaler: Upscaler, options: Options, report: Report) -> None:
        self.upscaler, self.options, self.report = upscaler, options, report
        self.summary = Summary()
        self.writing: deque[tuple[_Work, PictureFile]] = deque()

    def is_to_do(self, task: Task) -> bool:
        if task.problem is not None:
            self.fail(task, UserError(task.problem))
        elif task.target.exists() and not self.options.overwrite:
            self.summary.skipped.append(task.source)
            self.report.skipped(task)
        else:
            return True
        return False

    def fail(self, task: Task, error: Exception) -> None:
        self.summary.failed.append(task.source)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        line = " ".join(text.split())
        self.report.failed(task, line if line.startswith(str(task.source)) else f"{task.source}: {line}")

    def finish(self, task: Task, form: Form | None) -> None:
        self.summary.done.append(task.source)
        self.report.done(task, form)

    def video(self, task: Task) -> None:
        from esc_arch.tools.video.upscaling import upscale_video

        try:
            task.target.parent.mkdir(parents=True, exist_ok=True)
            upscale_video(
                self.upscaler,
                task.source,
                task.target,
                scale=self.options.settings.scale,
                batch=self.options.batch,
                overwrite=self.options.overwrite,
                max_memory=self.options.settings.max_memory,
                progress=self.report.progress,
                **self.options.video,
            )
        except Exception as error:
            self.fail(task, error)
        else:
            self.finish(task, None)

    def pictures(self, tasks: Sequence[Task]) -> None:
        readers = ThreadPoolExecutor(1, "read")
        try:
            for group in self._groups(tasks, readers):
                self._enlarge(group)
                self._collect(WRITERS if self.options.settings.max_memory is None else 0)
        finally:
            readers.shutdown(cancel_futures=True)
            self._collect(0)

    def _groups(self, tasks: Sequence[Task], readers: Executor) -> Iterator[list[_Work]]:
        """Pictures that can be run together: neighbours of one size."""
        group: list[_Work] = []
        for task, reading in _read_ahead(tasks, readers, self._ahead()):
            try:
                work = self._work(task, reading.result())
            except Exception as error:
                self.fail(task, error)
                continue
            size = work.picture.pixels.shape[:2]
            if group and size != group[0].picture.pixels.shape[:2]:
                yield group
                group = []
            group.append(work)
            if len(group) >= self.options.batch_of(self.upscaler, *size):
                yield group
                group = []
        if group:
            yield group

    def _ahead(self) -> int:
        """How many pictures may wait in memory."""
        return 0 if self.options.settings.max_memory is not None else 1 + (self.options.batch or 1)

    def _work(self, task: Task, picture: Picture) -> _Work:
        options, settings = self.options, self.options.settings
        form = form_of(
            task.target,
            picture,
            enlarged_size(self.upscaler, picture.pixels, settings),
            quality=options.quality,
            lossless=options.lossless,
            max_memory=settings.max_memory,
        )
        for remark in (*picture.remarks, *form.remarks):
            self.report.remark(task, f"{task.source}: {remark}.")
        return _Work(task, picture, form)

    def _enlarge(self, group: list[_Work]) -> None:
        if len(group) == 1:
            self._enlarge_one(group[0])
            return
        try:
            results = enlarge_many(self.upscaler, [work.picture.pixels for work in group], self.options.settings)
        except Exception:
            # Whichever it was that failed, the others need not
            for work in group:
                self._enlarge_one(work)
            return
        for work, pixels in zip(group, results, strict=True):
            self._write(work, partial(_give, pixels))

    def _enlarge_one(self, work: _Work) -> None:
        self._write(
            work,
            lambda write: enlarge_pixels(
                self.upscaler,
                work.picture.pixels,
                write,
                self.options.settings,
                dtype=work.form.dtype,
                scratch=work.task.target.parent,
                progress=self.report.progress,
            ),
        )

    def _write(self, work: _Work, compute: Callable[[Rows], None]) -> None:
        """Have a picture written as it is computed."""
        try:
            work.task.target.parent.mkdir(parents=True, exist_ok=True)
            file = PictureFile(work.task.target, work.form)
            try:
                compute(file.write)
                file.finish()
            except BaseException:
                file.give_up()
                raise
        except Exception as error:
            self.fail(work.task, error)
        else:
            self.writing.append((work, file))

    def _collect(self, most: int) -> None:
        """Wait until at most so many files are being written."""
        while len(self.writing) > most:
            work, file = self.writing[0]  # it stays there while it is waited for, lest an interruption forget it
            try:
                file.result()
            except Exception as error:
                self.fail(work.task, error)
            else:
                self.finish(work.task, work.form)
            self.writing.popleft()


def _give(pixels: Pixels, write: Rows) -> None:
    write(pixels)


def _read_ahead(tasks: Sequence[Task], readers: Executor, ahead: int) -> Iterator[tuple[Task, Future[Picture]]]:
    reading: deque[tuple[Task, Future[Picture]]] = deque()
    for task in tasks:
        reading.append((task, readers.submit(read_picture, task.source)))
        if len(reading) > ahead:
            yield reading.popleft()
    yield from reading
