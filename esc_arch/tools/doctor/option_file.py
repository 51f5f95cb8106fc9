"""What an option file names: folders, images, LMDBs, weights, and the space to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .report import PROBLEM, WARNING, Context, Finding, size_text, warn_if
from .subprocess_worker import JobFailed

__all__ = ["examine"]

#: With less space than this a training ends soon.
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
        text = str(failure).removeprefix("UserError: ")
        yield Finding("file", text, PROBLEM, "Give an option file that can be read.")
        return
    yield Finding("file", f"{file}; `basicsr check -opt {file}` looks at its keys and values")
    yield from _outputs(opt)
    for key, kind, path, *arguments in _inputs(opt):
        if kind not in ("disk", "lmdb", "weights"):
            yield Finding(key, f"not looked at: io_backend type {kind}")
        elif kind != "weights" and not Path(path).is_dir():
            text = f"{path} {'is no folder' if Path(path).exists() else 'does not exist'}"
            yield Finding(key, text, PROBLEM, "Relative paths start in the folder where the command is run.")
        else:
            advice = f"Reading {path} failed: create it again, or copy it again."
            yield from context.in_child(key, f"option_file:{kind}", key, path, *arguments, advice=advice)


def _outputs(opt: dict[str, Any]) -> Iterator[Finding]:
    """The folder that a run writes to, which may not exist yet: the space there, and a run of the same name."""
    verb, kind = ("train", "experiments") if opt.get("train") else ("test", "results")
    folder = Path(str((opt.get("path") or {}).get(f"{kind}_root") or kind)).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage, system = shutil.disk_usage(there), os.statvfs(there)
    text = f"{folder}, {size_text(usage.free)} of {size_text(usage.total)} free"
    advice = "Checkpoints, states and images take space: logger: keep_last removes old checkpoints."
    found = warn_if(usage.free < _LITTLE_SPACE, f"{kind}_root", text, advice, usage._asdict())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text += f"; {there} cannot be written"
        found = found._replace(text=text, status=PROBLEM, advice="Change its rights, or start elsewhere.")
    elif usage.free < _NO_SPACE or (system.f_files and system.f_favail < _FEW_FILES_LEFT):
        text += ": too little, or too few files"
        found = found._replace(text=text, status=PROBLEM, advice="Free some space before a run.")
    yield found
    run = folder / str(opt.get("name"))
    if run.exists():
        text = f"{run} exists: `basicsr {verb}` will rename it to {run.name}_archived_TIME"
        if verb == "train" and any((run / "training_states").glob("*.state")):
            text += "; with --auto_resume it continues there instead"
        yield Finding("same name", text, WARNING, "Change name: in the option file to leave it where it is.")


def _inputs(opt: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The key of each file and folder that a run reads, the function below for it, and further arguments of that."""
    for phase, dataset in (opt.get("datasets") or {}).items():
        kind = (dataset.get("io_backend") or {}).get("type", "disk")
        for key, roots in dataset.items():
            if key.startswith("dataroot"):
                for index, root in enumerate(roots if isinstance(roots, list) else [roots]):
                    label = f"datasets:{phase}:{key}{f'[{index}]' if isinstance(roots, list) else ''}"
                    yield label, kind, str(Path(str(root)).expanduser().absolute())
    paths = opt.get("path") or {}
    for key, path in paths.items():
        if path and (key.startswith(_WEIGHTS) or key == "resume_state"):
            yield f"path:{key}", "weights", str(path), paths.get(f"param_key_{key.removeprefix(_WEIGHTS)}")


def disk(key: str, root: str) -> list[Finding]:
    """Images in a folder, or in folders below it if it has none itself; as the next two in the child process."""
    from esc_arch.data.decoding import image_problem

    folder = Path(root)
    below = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in below if path.parent == folder] or below
    if not files:
        return [Finding(key, f"{root} has no files", PROBLEM, "Put the images there, or name their folder.")]
    sample = files[:: -(-len(files) // _SAMPLE)]
    bad = [f"{file.name} {problem}" for file in sample if (problem := image_problem(file.read_bytes()))]
    empty = [str(file) for file in files if not file.stat().st_size]
    text = f"{root}: {len(files)} files, {len(sample) - len(bad)} of {len(sample)} tried can be decoded"
    wrong = [(empty, "files are empty", PROBLEM), (bad, "of those tried are damaged", PROBLEM)]
    return _listed(key, text, wrong, "Get or create these files again, or remove them.")


def lmdb(key: str, root: str) -> list[Finding]:
    """An LMDB: damage, keys that only it or its list has, and images that cannot be decoded."""
    from esc_arch.data.lmdb_check import contents_of, listed_sizes, lmdb_problem

    folder = Path(root)
    sizes = listed_sizes(folder) if (folder / "meta_info.txt").is_file() else {}
    damage = lmdb_problem(folder) if sizes else "meta_info.txt is missing or empty"
    if damage is not None:
        return [Finding(key, f"{root}: {damage}", PROBLEM, _AGAIN)]
    found = contents_of(folder, sizes, _SAMPLE)
    size = size_text((folder / "data.mdb").stat().st_size)
    text = f"{root}: {found.keys} images, {size}, {found.tried - len(found.bad)} of {found.tried} tried can be decoded"
    partial = folder.with_name(f".{folder.name}.partial")
    wrong = [
        (found.missing, "keys of meta_info.txt are not in the database", PROBLEM),
        (found.unlisted, "images are not in meta_info.txt and never read", WARNING),
        ([f"{name} {problem}" for name, problem in found.bad.items()], "of those tried are damaged", PROBLEM),
        ([str(partial)] * partial.exists(), "folder is left from a `basicsr prepare` that was interrupted", WARNING),
    ]
    return _listed(key, text, wrong, _AGAIN)


def weights(key: str, path: str, param_key: str | None) -> list[Finding]:
    """A checkpoint, or a training state."""
    from esc_arch.checkpoints.reading import find_weights, read_checkpoint
    from esc_arch.errors import UserError

    file = os.path.expanduser(path)
    try:
        checkpoint = read_checkpoint(file)
        if key == "path:resume_state":
            return [Finding(key, f"{path}: epoch {checkpoint.get('epoch')}, iteration {checkpoint.get('iter')}")]
        found, tensors = find_weights(checkpoint, param_key, file)
    except UserError as error:
        return [Finding(key, str(error), PROBLEM, "A run that needs it ends with this message.")]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    text = f"{path}: {len(tensors)} tensors {f'under {found}' if found else 'without a key'}, {parameters:,} numbers"
    nonfinite = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    advice = "The training that made it went wrong: take an earlier checkpoint."
    return _listed(key, text, [(nonfinite, "tensors have numbers that are not finite", WARNING)], advice)


def _listed(key: str, text: str, wrong: Iterable[tuple[list[str], str, str]], advice: str) -> list[Finding]:
    """What was found, and then what is wrong: names, what is wrong with them, and the status."""
    from esc_arch.data.names import shown

    found = [Finding(key, text)]
    for names, what, status in wrong:
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            listed = ", ".join(shown(name) for name in names[:_LISTED]) + more
            found.append(Finding(f"{key} ({len(found) + 1})", f"{len(names)} {what}: {listed}", status, advice))
    return found
