"""Making what BasicSR validates and tests on: folders of HR images and their LR images.

Dictionaries by scale have the HR images (ground truth, GT) under 1 and the LR images (low quality, LQ) of
scale s under s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import basicsr

from esc_arch.atomic_io import locked, write_atomically, writing_to

from ..errors import UserError
from .image_files import Source, checked_scales, crop_to_multiple, downscale, encode_png, read_hr
from .worker_pool import map_in_order, progress_bar

__all__ = ["benchmark_folders", "prepare_benchmark"]

FORMAT = 1
"""To be raised when the same images and settings come to give other files; older files are then not taken as equal."""


def benchmark_folders(out: Path, scales: Iterable[int]) -> dict[int, Path]:
    """Where :func:`prepare_benchmark` writes, by scale."""
    return {1: out / "HR"} | {s: out / "LR_bicubic" / f"X{s}" for s in scales}


def prepare_benchmark(
    sources: Sequence[Source],
    out: Path,
    *,
    scales: Sequence[int] = (2, 3, 4),
    per_scale: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
) -> dict[int, Path]:
    """Write HR images and their LR images as the PNG files that validation and testing read.

    ``HR/NAME.png`` is cropped at the bottom and right to a multiple of all scales, ``LR_bicubic/Xs/NAMExs.png`` made
    from that (MATLAB's bicubic). With `per_scale` HR is not cropped, and what the LR of a scale is made from is cropped
    to a multiple of that scale alone, as published LR are; BasicSR's paired data set, where it does not train, crops HR
    to what belongs to the LR. ``prepare.json`` in `out` notes what was made from what: files with the same
    settings are kept, others are never touched without `overwrite`. Each file is there in full or not at all.

    Args:
        sources: the HR images.
        out: folder for all of it.
        scales: of the LR images.
        per_scale: whether to crop for each scale by itself.
        jobs: how many processes work.
        overwrite: replace files in the way that this function did not make with these settings.

    Returns:
        The folders by scale, see :func:`benchmark_folders`.

    Raises:
        UserError: an image or `out` cannot be used, files are in the way, or the folders hold other images.
    """
    scales = checked_scales(scales)
    folders = benchmark_folders(out, scales)
    tasks = [_BenchmarkTask(source, folders, scales, per_scale) for source in sources]
    recipes = {path: recipe for task in tasks for path, recipe in task.recipes().items()}
    _refuse_other_images(folders.values(), recipes.keys())
    with locked(out):
        record = _Record(out)
        existing = {path for path in recipes if path.exists()}
        made = {path for path in existing if record.get(path) == recipes[path]}
        in_the_way = existing - made
        if in_the_way and not overwrite:
            raise UserError(
                f"{min(in_the_way)} exists, and was not made by this command with these settings (one of "
                f"{len(in_the_way)} such files). Give --overwrite to replace them, or another folder."
            )
        remaining = [task for task in tasks if not task.recipes().keys() <= made]
        with writing_to(out):
            for folder in folders.values():
                folder.mkdir(parents=True, exist_ok=True)
            # Noted before they are made, so that after a kill they are known. Of those to be replaced nothing is
            # known until all are: a kill leaves old and new ones.
            record.update({path: None if path in in_the_way else recipe for path, recipe in recipes.items()})
        with (
            progress_bar(len(tasks), len(tasks) - len(remaining)) as progress,
            closing(map_in_order(_benchmark_files, remaining, jobs)) as results,
        ):
            for files in results:
                with writing_to(out):
                    for path in files.keys() - made:
                        write_atomically(path, files[path])
                progress.update()
        with writing_to(out):
            record.update(recipes)
    return folders


@dataclass(frozen=True)
class _BenchmarkTask:
    source: Source
    folders: Mapping[int, Path]
    scales: tuple[int, ...]
    per_scale: bool

    def paths(self) -> dict[int, Path]:
        """The files to make, by scale."""
        suffixes = {scale: ".png" if scale == 1 else f"x{scale}.png" for scale in self.folders}
        return {scale: folder / f"{self.source.stem}{suffixes[scale]}" for scale, folder in self.folders.items()}

    def recipes(self) -> dict[Path, str]:
        """For each file to make, a digest of all that its content depends on."""
        crop = "per-scale" if self.per_scale else math.lcm(*self.scales)
        common = [FORMAT, basicsr.__version__, self.source.identity, crop]
        return {
            path: hashlib.sha256(json.dumps([*common, scale]).encode()).hexdigest()
            for scale, path in self.paths().items()
        }


def _benchmark_files(task: _BenchmarkTask) -> dict[Path, bytes]:
    hr = read_hr(task.source, task.scales, crop=not task.per_scale)
    return {
        path: encode_png(hr if s == 1 else downscale(crop_to_multiple(hr, s), s)) for s, path in task.paths().items()
    }


def _refuse_other_images(folders: Iterable[Path], wanted: Iterable[Path]) -> None:
    """BasicSR pairs all files of the HR folder with all of the LR folder, so strangers make both useless."""
    wanted = set(wanted)
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path not in wanted and not path.name.startswith("."):
                raise UserError(
                    f"{path} does not belong to these images, but BasicSR would read it with them. "
                    "Move it away, or choose another folder."
                )


class _Record:
    """The file prepare.json of a benchmark: the recipe of every file made, by its path relative to `out`.

    None stands for a file of which it is not known.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = out / "prepare.json"
        self._recipes: dict[str, str | None] = {}
        if self._file.exists():
            try:
                self._recipes = dict(json.loads(self._file.read_bytes())["files"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._file} was not written by this command, or is damaged. Remove it.") from error

    def get(self, path: Path) -> str | None:
        return self._recipes.get(self._name(path))

    def update(self, recipes: Mapping[Path, str | None]) -> None:
        self._recipes |= {self._name(path): recipe for path, recipe in recipes.items()}
        write_atomically(self._file, json.dumps({"files": self._recipes}, indent=1, sort_keys=True).encode())

    def _name(self, path: Path) -> str:
        return path.relative_to(self._out).as_posix()
