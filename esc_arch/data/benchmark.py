"""Making what BasicSR validates and tests on: folders of HR images and their LR images, by scale; 1 stands for HR."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from esc_arch.atomic_io import locked, read_regular, write_atomically, writing_to

from ..errors import UserError
from .image_files import Source, checked_scales, crop_to_multiple, digest_of, downscale, encode_png, read_hr
from .worker_pool import map_in_order

__all__ = ["benchmark_folders", "prepare_benchmark"]

FORMAT = 1
"""Increase it when the same images and settings come to give other files; older files are then not taken as equal."""
RECORD_FILE = "prepare.json"


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
    from that (MATLAB's bicubic). With `per_scale` HR is not cropped, and the LR of each scale is made from as much of
    it as that scale divides, as published LR are. Files that ``prepare.json`` in `out` says were made with the same
    settings are kept, others are never touched without `overwrite`. Returns the folders by scale.

    UserError if an image or `out` cannot be used, files are in the way, or the folders hold other images.
    """
    import basicsr

    scales = checked_scales(scales)
    folders = benchmark_folders(out, scales)
    tasks = [
        (source, {1: f"HR/{source.stem}.png"} | {s: f"LR_bicubic/X{s}/{source.stem}x{s}.png" for s in scales})
        for source in sources
    ]
    crop = "per-scale" if per_scale else math.lcm(*scales)
    #: For each file to make, a digest of all that its content depends on
    recipes = {
        name: digest_of([FORMAT, basicsr.__version__, source.identity, crop, scale])
        for source, names in tasks
        for scale, name in names.items()
    }
    _refuse_other_images(folders.values(), {out / name for name in recipes})
    with locked(out), writing_to(out):
        record = _read_record(out)
        existing = {name for name in recipes if (out / name).exists()}
        made = {name for name in existing if record.get(name) == recipes[name]}
        in_the_way = existing - made
        if in_the_way and not overwrite:
            raise UserError(
                f"{out / min(in_the_way)} exists, and was not made by this command with these settings (one of "
                f"{len(in_the_way)} such files). Give --overwrite to replace them, or another folder."
            )
        remaining = [(source, names) for source, names in tasks if not made.issuperset(names.values())]
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        # Noted before they are made, so that after a kill they are known. Of those to be replaced nothing is
        # known until all are: a kill leaves old and new ones.
        _write_record(out, record | recipes | dict.fromkeys(in_the_way))
        encoded = partial(_encoded, scales=scales, per_scale=per_scale)
        with map_in_order(encoded, remaining, jobs, finished=len(tasks) - len(remaining)) as results:
            for files in results:
                for name in files.keys() - made:
                    write_atomically(out / name, files[name])
        _write_record(out, record | recipes)
    return folders


def _encoded(task: tuple[Source, Mapping[int, str]], *, scales: Sequence[int], per_scale: bool) -> dict[str, bytes]:
    """The PNG files of an HR image, by the names that they are to have, which are given by scale."""
    source, names = task
    hr = read_hr(source, scales, crop=not per_scale)
    images = ((name, hr if s == 1 else downscale(crop_to_multiple(hr, s), s)) for s, name in names.items())
    return {name: encode_png(image) for name, image in images}


def _refuse_other_images(folders: Iterable[Path], wanted: set[Path]) -> None:
    """BasicSR pairs all files of the HR folder with all of the LR folder, so strangers make both useless."""
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path not in wanted and not path.name.startswith("."):
                raise UserError(
                    f"{path} does not belong to these images, but BasicSR would read it with them. "
                    "Move it away, or choose another folder."
                )


def _read_record(out: Path) -> dict[str, str | None]:
    """The recipe of every file that was made, by its path relative to `out`; None for files in an unknown state."""
    file = out / RECORD_FILE
    try:
        return dict(json.loads(read_regular(file))["files"]) if file.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} was not written by this command, or is damaged. Remove it.") from error


def _write_record(out: Path, record: Mapping[str, str | None]) -> None:
    write_atomically(out / RECORD_FILE, json.dumps({"files": record}, indent=1, sort_keys=True).encode())
