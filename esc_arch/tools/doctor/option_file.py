"""What an option file names: folders, images, LMDBs, weights, and the room to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .context import Context
from .report import PROBLEM, WARNING, Finding
from .sizes import GIB, MIB, size_text
from .subprocess_worker import JobFailed

__all__ = ["examine"]

#: Less room than this ends a training soon.
_LITTLE_SPACE, _NO_SPACE = 10 * GIB, 500 * MIB
_FEW_FILES_LEFT = 1000
_WEIGHTS = "pretrain_network_"


def examine(context: Context) -> Iterator[Finding]:
    """Nothing without -opt."""
    file = context.args.opt
    if file is None:
        yield Finding("file", "none given: -opt FILE looks at its data, weights and folders")
        return
    try:
        opt = context.worker.call("esc_arch.tools.doctor.data_health:read_options", file)
    except JobFailed as failure:
        message = str(failure).removeprefix("UserError: ")
        yield Finding("file", message, PROBLEM, "Give an option file that can be read.")
        return
    yield Finding("file", f"{file}; `basicsr check -opt {file}` looks at its keys and values")
    yield from _outputs(opt)
    for phase, dataset in _mapping(opt, "datasets").items():
        if isinstance(dataset, dict):
            context.tell(f"datasets:{phase} ...")
            yield from _dataset(context, f"datasets:{phase}", dataset)
    yield from _weights(context, _mapping(opt, "path"))


def _mapping(opt: dict[str, Any], key: str) -> dict[str, Any]:
    value = opt.get(key)
    return value if isinstance(value, dict) else {}


# --- where a run writes -------------------------------------------------------------------------------------------


def _outputs(opt: dict[str, Any]) -> Iterator[Finding]:
    trains = bool(opt.get("train"))
    key = "experiments_root" if trains else "results_root"
    root = Path(os.path.expanduser(str(_mapping(opt, "path").get(key) or key.removesuffix("_root")))).absolute()
    yield _room(key, root)
    run = root / str(opt.get("name"))
    if not run.exists():
        return
    verb = "train" if trains else "test"
    text = f"{run} is there: `basicsr {verb}` will rename it to {run.name}_archived_TIME"
    if trains and any((run / "training_states").glob("*.state")):
        text += "; with --auto_resume it goes on there instead"
    yield Finding("same name", text, WARNING, "Change name: in the option file to leave it where it is.")


def _room(key: str, folder: Path) -> Finding:
    """Whether a folder that may not be there yet can be written, and how much."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Finding(key, f"{folder}: {error.strerror}", PROBLEM, "Name a folder that can be read.")
    text = f"{folder}, {size_text(usage.free)} of {size_text(usage.total)} free"
    data = {"folder": str(folder), "free": usage.free, "total": usage.total}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text += f"; {there} cannot be written"
        return Finding(key, text, PROBLEM, "Change its rights, or start elsewhere.", data)
    if usage.free < _NO_SPACE or _files_left(there) < _FEW_FILES_LEFT:
        return Finding(key, f"{text}: too little, or too few files", PROBLEM, "Make room before a run.", data)
    if usage.free < _LITTLE_SPACE:
        advice = "Checkpoints, states and pictures take room: logger: keep_last removes old checkpoints."
        return Finding(key, text, WARNING, advice, data)
    return Finding(key, text, data=data)


def _files_left(folder: Path) -> float:
    """How many files more a file system takes; infinite where it has no such limit."""
    if not hasattr(os, "statvfs"):
        return float("inf")
    system = os.statvfs(folder)
    return system.f_favail if system.f_files else float("inf")


# --- what a run reads ---------------------------------------------------------------------------------------------


def _dataset(context: Context, name: str, dataset: dict[str, Any]) -> Iterator[Finding]:
    backend = dataset.get("io_backend")
    kind = backend.get("type") if isinstance(backend, dict) else "disk"
    if kind not in ("disk", "lmdb"):
        yield Finding(name, f"not looked at: io_backend type {kind}")
        return
    for key, value in dataset.items():
        if not key.startswith("dataroot"):
            continue
        for index, root in enumerate(value if isinstance(value, list) else [value]):
            label = f"{name}:{key}{f'[{index}]' if isinstance(value, list) else ''}"
            yield from _data(context, label, str(kind), str(root))


def _data(context: Context, label: str, kind: str, root: str) -> Iterator[Finding]:
    folder = Path(os.path.expanduser(root)).absolute()
    try:
        found = context.worker.call(f"esc_arch.tools.doctor.data_health:{kind}_health", str(folder))
    except JobFailed as failure:
        yield Finding(label, f"{folder}: reading it failed: {failure}", PROBLEM, "Create it again, or copy it again.")
        return
    for index, (text, status, advice) in enumerate(found):
        yield Finding(label if not index else f"{label} ({index + 1})", text, status, advice)


def _weights(context: Context, paths: dict[str, Any]) -> Iterator[Finding]:
    for key, file in paths.items():
        if not file or not (key.startswith(_WEIGHTS) or key == "resume_state"):
            continue
        param_key = paths.get(f"param_key_{key.removeprefix(_WEIGHTS)}")
        path = os.path.expanduser(str(file))
        function = "state_health" if key == "resume_state" else "weights_health"
        try:
            text, *rest = context.worker.call(f"esc_arch.tools.doctor.data_health:{function}", path, param_key)
        except JobFailed as failure:
            message = str(failure).removeprefix("UserError: ")
            yield Finding(f"path:{key}", message, PROBLEM, "A run that needs it ends with this message.")
        else:
            yield Finding(f"path:{key}", f"{file}: {text}", *rest)
