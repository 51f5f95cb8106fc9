"""Whether option files, images, LMDBs and weights can be read; in the child process, which damaged ones may end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .report import OK, PROBLEM, WARNING
from .sizes import size_text

__all__ = ["disk_health", "lmdb_health", "read_options", "state_health", "weights_health"]

#: Text, status and advice, as of `report.Finding`.
Line = tuple[str, str, str]

#: Images that are decoded, evenly spread over the data.
_SAMPLE = 8
_LISTED = 3
_ANEW = "Create it again: basicsr prepare makes LMDBs."


def read_options(file: str) -> dict[str, Any]:
    """What an option file says.

    Raises:
        UserError: it cannot be read.
    """
    from esc_arch.options.files import load_yaml

    return load_yaml(file)


# --- folders ------------------------------------------------------------------------------------------------------


def disk_health(root: str) -> list[Line]:
    """A folder of images, with those in folders below it where it has none itself."""
    from esc_arch.data.decoding import image_problem

    folder = Path(root)
    if (unreadable := _unreadable_folder(folder)) is not None:
        return [unreadable]
    files = _files(folder)
    if not files:
        return [(f"{root} has no files", PROBLEM, "Put the images there, or name their folder.")]
    empty = [file for file in files if not file.stat().st_size]
    sample = _spread(files)
    bad = [f"{file.name} {problem}" for file in sample if (problem := image_problem(file.read_bytes()))]
    lines = [(f"{root}: {len(files)} files, {len(sample) - len(bad)} of {len(sample)} tried can be decoded", OK, "")]
    if empty:
        lines.append((f"{len(empty)} files are empty: {_some(map(str, empty))}", PROBLEM, "Get or create them again."))
    if bad:
        lines.append((_some(bad), PROBLEM, "Get or create these files again, or remove them."))
    return lines


def _unreadable_folder(folder: Path) -> Line | None:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        return f"{folder} {what}", PROBLEM, "Relative paths start in the folder where the command is run."
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder} cannot be read: no permission", PROBLEM, "Change its rights."
    return None


def _files(folder: Path) -> list[Path]:
    """All but hidden ones, as BasicSR takes them."""
    direct = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return direct or sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


# --- LMDBs --------------------------------------------------------------------------------------------------------


def lmdb_health(root: str) -> list[Line]:
    """An LMDB with its list: whole, opens for reading, has the keys of the list, and its images can be decoded."""
    from esc_arch.data.lmdb_check import lmdb_problem

    folder = Path(root)
    if (problem := _unreadable_folder(folder)) is not None:
        return [problem]
    for name in ("data.mdb", "meta_info.txt"):
        if not (folder / name).is_file():
            return [(f"{root} has no {name}", PROBLEM, _ANEW)]
        if not (folder / name).stat().st_size:
            return [(f"{root}: {name} is empty", PROBLEM, _ANEW)]
    if (damage := lmdb_problem(folder)) is not None:
        return [(f"{root}: {damage}", PROBLEM, _ANEW)]
    return [*_contents(folder), *_left_over(folder)]


def _contents(folder: Path) -> list[Line]:
    from esc_arch.data.lmdb_check import contents_of, listed_sizes

    sizes = listed_sizes(folder)
    found = contents_of(folder, sizes, _SAMPLE)
    size = size_text((folder / "data.mdb").stat().st_size)
    good = f"{found.tried - len(found.bad)} of {found.tried} tried can be decoded"
    lines = [(f"{folder}: {found.keys} images, {size}, {good}", OK, "")]
    if found.missing:
        text = f"{len(found.missing)} of {len(sizes)} keys of meta_info.txt are not in the database: "
        lines.append((text + _some(found.missing), PROBLEM, _ANEW))
    if found.unlisted:
        text = f"{len(found.unlisted)} of {found.keys} images are not in meta_info.txt and never read: "
        lines.append((text + _some(found.unlisted), WARNING, _ANEW))
    if found.bad:
        lines.append((_some(f"{key} {problem}" for key, problem in found.bad.items()), PROBLEM, _ANEW))
    return lines


def _left_over(folder: Path) -> Iterable[Line]:
    """What a program that wrote there has left."""
    if (folder / "lock.mdb").exists():
        yield "lock.mdb is left from a program that wrote there; reading does not need it", OK, ""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        advice = "Run the same `basicsr prepare` again to finish it, or remove it."
        yield f"{partial} is left from a `basicsr prepare` that was interrupted", WARNING, advice


# --- weights ------------------------------------------------------------------------------------------------------


def weights_health(path: str, param_key: str | None) -> Line:
    """What a checkpoint holds.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    from esc_arch.checkpoints.reading import find_weights, read_checkpoint

    key, weights = find_weights(read_checkpoint(path), param_key, path)
    parameters = sum(tensor.numel() for tensor in weights.values())
    nonfinite = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    told = f"{len(weights)} tensors {f'under {key}' if key else 'without a key'}, {parameters:,} numbers"
    if nonfinite:
        text = f"{told}, not all of them finite: {_some(nonfinite)}"
        return text, WARNING, "The training that made it went wrong: take an earlier checkpoint."
    return told, OK, ""


def state_health(path: str, _: str | None) -> Line:
    """What a training state holds.

    Raises:
        UserError: it cannot be read.
    """
    from esc_arch.checkpoints.reading import read_checkpoint

    state = read_checkpoint(path)
    return f"epoch {state.get('epoch')}, iteration {state.get('iter')}", OK, ""


def _spread(entries: Sequence[Any]) -> list[Any]:
    """A few, from the first to the last."""
    count = min(_SAMPLE, len(entries))
    return [entries[index * (len(entries) - 1) // max(count - 1, 1)] for index in range(count)]


def _some(names: Iterable[str]) -> str:
    from esc_arch.data.names import shown

    listed = [shown(name) for name in names]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
