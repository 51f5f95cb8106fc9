"""What an option file names: folders, images, LMDBs, weights, and the room to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .report import PROBLEM, WARNING, Context, Finding, size_text, warn_if
from .subprocess_worker import JobFailed

__all__ = ["examine"]

#: Less room than this ends a training soon.
_LITTLE_SPACE, _NO_SPACE = 10 * 2**30, 500 * 2**20
_FEW_FILES_LEFT = 1000
_WEIGHTS = "pretrain_network_"
#: Images that are decoded, evenly spread over the data, and names that are listed.
_SAMPLE, _LISTED = 8, 3
_AGAIN = "Create it again: basicsr prepare makes LMDBs."


def examine(context: Context) -> Iterator[Finding]:
    """Nothing without -opt."""
    file = context.args.opt
    if file is None:
        yield Finding("file", "none given: -opt FILE looks at its data, weights and folders")
        return
    try:
        opt = context.worker.call("esc_arch.options.files:load_yaml", file)
    except JobFailed as failure:
        yield Finding(
            "file", str(failure).removeprefix("UserError: "), PROBLEM, "Give an option file that can be read."
        )
        return
    yield Finding("file", f"{file}; `basicsr check -opt {file}` looks at its keys and values")
    yield from _outputs(opt)
    datasets = _mapping(opt, "datasets")
    for phase in datasets:
        yield from _dataset(context, f"datasets:{phase}", _mapping(datasets, phase))
    paths = _mapping(opt, "path")
    for key, path in paths.items():
        if path and (key.startswith(_WEIGHTS) or key == "resume_state"):
            param_key = paths.get(f"param_key_{key.removeprefix(_WEIGHTS)}")
            yield from context.in_child(f"path:{key}", "option_file:weights_health", key, str(path), param_key)


def _mapping(opt: dict[str, Any], key: str) -> dict[str, Any]:
    value = opt.get(key)
    return value if isinstance(value, dict) else {}


def _outputs(opt: dict[str, Any]) -> Iterator[Finding]:
    """Where a run writes."""
    verb, kind = ("train", "experiments") if opt.get("train") else ("test", "results")
    root = Path(str(_mapping(opt, "path").get(f"{kind}_root") or kind)).expanduser().absolute()
    yield _room(f"{kind}_root", root)
    run = root / str(opt.get("name"))
    if run.exists():
        text = f"{run} exists: `basicsr {verb}` will rename it to {run.name}_archived_TIME"
        if verb == "train" and any((run / "training_states").glob("*.state")):
            text += "; with --auto_resume it continues there instead"
        yield Finding("same name", text, WARNING, "Change name: in the option file to leave it where it is.")


def _room(key: str, folder: Path) -> Finding:
    """Whether a folder that may not exist yet can be written, and how much."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage, system = shutil.disk_usage(there), os.statvfs(there)
    text = f"{folder}, {size_text(usage.free)} of {size_text(usage.total)} free"
    data = {"folder": str(folder), "free": usage.free, "total": usage.total}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text += f"; {there} cannot be written"
        return Finding(key, text, PROBLEM, "Change its rights, or start elsewhere.", data)
    if usage.free < _NO_SPACE or (system.f_files and system.f_favail < _FEW_FILES_LEFT):
        return Finding(key, f"{text}: too little, or too few files", PROBLEM, "Make room before a run.", data)
    advice = "Checkpoints, states and images take room: logger: keep_last removes old checkpoints."
    return warn_if(usage.free < _LITTLE_SPACE, key, text, advice, data)


def _dataset(context: Context, name: str, dataset: dict[str, Any]) -> Iterator[Finding]:
    kind = _mapping(dataset, "io_backend").get("type", "disk")
    if kind not in ("disk", "lmdb"):
        yield Finding(name, f"not looked at: io_backend type {kind}")
        return
    for key, value in dataset.items():
        if key.startswith("dataroot"):
            for index, root in enumerate(value if isinstance(value, list) else [value]):
                label = f"{name}:{key}{f'[{index}]' if isinstance(value, list) else ''}"
                folder = str(Path(str(root)).expanduser().absolute())
                advice = f"{folder}: reading it failed; create it again, or copy it again."
                yield from context.in_child(label, "option_file:data_health", label, kind, folder, advice=advice)


def data_health(label: str, kind: str, root: str) -> list[Finding]:
    """What is wrong with a folder of images (`kind` disk) or an LMDB."""
    folder = Path(root)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        advice = "Relative paths start in the folder where the command is run."
        return [Finding(label, f"{folder} {what}", PROBLEM, advice)]
    found = list(_lmdb(label, folder) if kind == "lmdb" else _images(label, folder))
    return [each._replace(key=f"{label} ({number})" if number > 1 else label) for number, each in enumerate(found, 1)]


def _images(label: str, folder: Path) -> Iterator[Finding]:
    """Images in a folder, or in folders below it if it has none itself."""
    from esc_arch.data.decoding import image_problem

    files = _files(folder.iterdir()) or _files(folder.rglob("*"))
    if not files:
        yield Finding(label, f"{folder} has no files", PROBLEM, "Put the images there, or name their folder.")
        return
    sample = files[:: -(-len(files) // _SAMPLE)]
    bad = [f"{file.name} {problem}" for file in sample if (problem := image_problem(file.read_bytes()))]
    yield Finding(
        label, f"{folder}: {len(files)} files, {len(sample) - len(bad)} of {len(sample)} tried can be decoded"
    )
    if empty := [str(file) for file in files if not file.stat().st_size]:
        yield Finding(label, f"{len(empty)} files are empty: {_some(empty)}", PROBLEM, "Get or create them again.")
    if bad:
        yield Finding(label, _some(bad), PROBLEM, "Get or create these files again, or remove them.")


def _files(paths: Iterable[Path]) -> list[Path]:
    """All but hidden ones, as BasicSR takes them."""
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _lmdb(label: str, folder: Path) -> Iterator[Finding]:
    """Whether an LMDB is whole, has the keys of its list, and images that can be decoded."""
    from esc_arch.data.lmdb_check import contents_of, listed_sizes, lmdb_problem

    sizes = listed_sizes(folder) if (folder / "meta_info.txt").is_file() else {}
    damage = lmdb_problem(folder) if sizes else "meta_info.txt is missing or empty"
    if damage is not None:
        yield Finding(label, f"{folder}: {damage}", PROBLEM, _AGAIN)
        return
    found = contents_of(folder, sizes, _SAMPLE)
    size = size_text((folder / "data.mdb").stat().st_size)
    good = found.tried - len(found.bad)
    yield Finding(label, f"{folder}: {found.keys} images, {size}, {good} of {found.tried} tried can be decoded")
    bad = [f"{key} {problem}" for key, problem in found.bad.items()]
    for names, what, status in (
        (found.missing, "keys of meta_info.txt are not in the database", PROBLEM),
        (found.unlisted, "images are not in meta_info.txt and never read", WARNING),
        (bad, "images are damaged, or not as listed", PROBLEM),
    ):
        if names:
            yield Finding(label, f"{len(names)} {what}: {_some(names)}", status, _AGAIN)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        advice = "Run the same `basicsr prepare` again to finish it, or remove it."
        yield Finding(label, f"{partial} is left from a `basicsr prepare` that was interrupted", WARNING, advice)


def weights_health(key: str, path: str, param_key: str | None) -> list[Finding]:
    """What a checkpoint, or a training state (`key` resume_state), holds."""
    from esc_arch.checkpoints.reading import find_weights, read_checkpoint
    from esc_arch.errors import UserError

    label, file = f"path:{key}", os.path.expanduser(path)
    try:
        checkpoint = read_checkpoint(file)
        if key == "resume_state":
            return [Finding(label, f"{path}: epoch {checkpoint.get('epoch')}, iteration {checkpoint.get('iter')}")]
        found, weights = find_weights(checkpoint, param_key, file)
    except UserError as error:
        return [Finding(label, str(error), PROBLEM, "A run that needs it ends with this message.")]
    parameters = sum(tensor.numel() for tensor in weights.values())
    text = f"{path}: {len(weights)} tensors {f'under {found}' if found else 'without a key'}, {parameters:,} numbers"
    nonfinite = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    text += f", not all of them finite: {_some(nonfinite)}" if nonfinite else ""
    advice = "The training that made it went wrong: take an earlier checkpoint."
    return [warn_if(nonfinite, label, text, advice)]


def _some(names: Iterable[str]) -> str:
    from esc_arch.data.names import shown

    listed = [shown(name) for name in names]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
