"""What the folder of a training says of the network that it trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.checkpoints.conversion import Checkpoint
from esc_arch.errors import UserError
from esc_arch.names import OWN
from esc_arch.options import load_yaml
from esc_arch.training.history import History

__all__ = ["UNKNOWN", "Training", "read_experiment"]

#: Options in which the experiment's network and the weights must agree.
COMPARED = ("type", "dim", "n_blocks", "upscaling_factor")


class Training(NamedTuple):
    """How a network was trained, and what it reached.

    Attributes:
        settings: of the option file, without paths and those that are not known: `data`, `gt_size`, `train` and others.
        on_the_fly: True if LR images were degraded at random while training.
        scores: values measured at the iteration of the weights, by data set and metric.
    """

    settings: Mapping[str, Any]
    on_the_fly: bool
    scores: Mapping[tuple[str, str], float]


UNKNOWN = Training({}, False, {})


def read_experiment(folder: Path, weights: Path, checkpoint: Checkpoint) -> Training:
    """Read the option file, as training copies it to the folder of an experiment, and `metrics.jsonl`.

    Args:
        weights: the checkpoint's file; `net_g_5000.pth` is of iteration 5000 unless its own `iter` says otherwise.

    Raises:
        UserError: there is no such folder, no option file in it, or one of another network.
    """
    files = sorted(folder.glob("*.yml"), key=lambda file: file.stat().st_mtime)
    if not files:
        what = "no option file (*.yml) in it" if folder.is_dir() else "no such folder"
        raise UserError(f"--experiment {folder}: {what}. Give experiments/NAME of the training.")
    options = load_yaml(files[-1])
    given, ours = _section(options, "network_g"), checkpoint.network_g
    theirs = {key: given[key] for key in COMPARED if key in given}
    if "type" in theirs:
        theirs["type"] = str(theirs["type"]).removeprefix(OWN)
    if differing := [key for key in theirs if theirs[key] != ours.get(key)]:
        sides = (", ".join(f"{key}: {side.get(key)}" for key in differing) for side in (theirs, ours))
        raise UserError(
            f"--experiment {folder} trained a network with {next(sides)}; {weights} has {next(sides)}. "
            "Give the experiment of these weights."
        )
    records = [record for record in History(folder / "metrics.jsonl").records() if "dataset" in record]
    iteration = checkpoint.beside.get("iter")
    if not isinstance(iteration, int):
        named = re.fullmatch(r"net_g_(\d+)", weights.stem)
        iteration = int(named[1]) if named else records[-1]["iter"] if records else None
    train_set = _section(_section(options, "datasets"), "train")
    settings = {
        "data": train_set.get("name"),
        "gt_size": train_set.get("gt_size", options.get("gt_size")),
        "batch_size_per_gpu": train_set.get("batch_size_per_gpu"),
        "iterations": iteration,
        "manual_seed": options.get("manual_seed"),
        "train": _without_paths(_section(options, "train")),
    }
    scores = {
        (str(record["dataset"]), metric): float(value)
        for record in records
        if record["iter"] == iteration
        for metric, value in record.items()
        if metric != "iter" and isinstance(value, int | float)
    }
    known = {name: value for name, value in settings.items() if value is not None}
    return Training(known, train_set.get("type") == "RealESRGANDataset", scores)


def _section(options: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = options.get(key)
    return value if isinstance(value, Mapping) else {}


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if not _is_path(item)}
    return [_without_paths(item) for item in value if not _is_path(item)] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and re.search(r"[/\\]", value) is not None
