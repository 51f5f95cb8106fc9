"""What the folder of a training says of the network that came out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esc_arch.errors import UserError
from esc_arch.options import Options, load_yaml
from esc_arch.register import OWN
from esc_arch.training.history import History

__all__ = ["Training", "read_experiment"]

#: Of the networks of an experiment and of weights, what must be the same.
COMPARED = ("type", "dim", "n_blocks", "upscaling_factor")
#: Data sets that make LR images again each time they are drawn, by chance.
ON_THE_FLY = ("RealESRGANDataset",)


@dataclass(frozen=True)
class Training:
    """How a network was trained, and what it reached.

    Attributes:
        options: of the option file.
        iteration: that the weights are of; None where nothing says it.
        metrics: values measured at that iteration, by data set and metric.
    """

    options: Options
    iteration: int | None
    metrics: dict[str, dict[str, float]]

    @property
    def data(self) -> str | None:
        """The name of the training data."""
        name = self._train_set.get("name")
        return str(name) if name else None

    @property
    def gt_size(self) -> int | None:
        """Side of HR patches, in pixels."""
        size = self._train_set.get("gt_size", self.options.get("gt_size"))
        return size if isinstance(size, int) else None

    @property
    def on_the_fly(self) -> bool:
        """Whether LR images were degraded by chance while training."""
        return self._train_set.get("type") in ON_THE_FLY

    def rows(self) -> list[tuple[str, str]]:
        """The settings for people to read, a name and a value each."""
        train = _mapping(self.options.get("train"))
        optimiser = _mapping(train.get("optim_g"))
        schedule = _mapping(train.get("scheduler"))
        losses = {key: value for key, value in train.items() if key.endswith("_opt") and isinstance(value, Mapping)}
        losses |= _mapping(train.get("losses"))
        rows = [
            ("training data", self.data),
            ("HR patches", None if self.gt_size is None else f"{self.gt_size} x {self.gt_size}"),
            ("batch per process", self._train_set.get("batch_size_per_gpu")),
            ("iterations", None if self.iteration is None else f"{self.iteration:,}"),
            ("losses", ", ".join(_loss(key, value) for key, value in losses.items())),
            ("optimiser", _call(optimiser)),
            ("schedule", _call(schedule)),
            ("warm-up", _positive(train.get("warmup_iter"))),
            ("average of weights", _positive(train.get("ema_decay"))),
            ("precision", train.get("amp")),
            ("seed", self.options.get("manual_seed")),
        ]
        return [(name, str(value)) for name, value in rows if value not in (None, "")]

    @property
    def _train_set(self) -> Mapping[str, Any]:
        return _mapping(_mapping(self.options.get("datasets")).get("train"))


def read_experiment(folder: Path, weights: Path, network_g: Mapping[str, Any], beside: Mapping[str, Any]) -> Training:
    """What the folder of an experiment says.

    Args:
        folder: with the option file, as training copies it there, and `metrics.jsonl`.
        weights: the checkpoint's file; of `net_g_5000.pth` the iteration is 5000.
        network_g: the network of the weights.
        beside: plain values in the checkpoint; its `iter` comes first.

    Raises:
        UserError: there is no such folder, no option file in it, or one of another network.
    """
    if not folder.is_dir():
        raise UserError(f"--experiment {folder}: there is no such folder. Give experiments/NAME of the training.")
    files = sorted(folder.glob("*.yml"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"--experiment {folder}: no option file (*.yml) in it. Give experiments/NAME of the training.")
    options = load_yaml(files[-1])
    section = dict(_mapping(options.get("network_g")))
    if "type" in section:
        section["type"] = str(section["type"]).removeprefix(OWN)
    differing = [key for key in COMPARED if key in section and section[key] != network_g.get(key)]
    if differing:
        theirs, ours = (", ".join(f"{key}: {side.get(key)}" for key in differing) for side in (section, network_g))
        raise UserError(
            f"--experiment {folder} trained another network than that of {weights}: {theirs}, where the weights are "
            f"of {ours}. Give the folder that these weights are from."
        )
    records = [record for record in History(folder / "metrics.jsonl").records() if "dataset" in record]
    iteration = _iteration(weights, beside)
    if iteration is None and records:
        iteration = int(records[-1]["iter"])
    metrics: dict[str, dict[str, float]] = {}
    for record in records:
        if record["iter"] == iteration:
            values = {key: value for key, value in record.items() if key not in ("iter", "dataset")}
            numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
            metrics.setdefault(str(record["dataset"]), {}).update(numbers)
    return Training(options, iteration, metrics)


def _iteration(weights: Path, beside: Mapping[str, Any]) -> int | None:
    said = beside.get("iter")
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    found = re.fullmatch(r"net_g_(\d+)", weights.stem)
    return int(found[1]) if found else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and value > 0 else None


def _call(section: Mapping[str, Any]) -> str:
    """`AdamW (lr: 0.0005, betas: [0.9, 0.9])`"""
    options = ", ".join(f"{key}: {value}" for key, value in section.items() if key != "type")
    return f"{section['type']} ({options})" if "type" in section and options else str(section.get("type", ""))


def _loss(name: str, section: Any) -> str:
    section = _mapping(section)
    weight = section.get("loss_weight", section.get("perceptual_weight", 1))
    kind = section.get("type", name.removesuffix("_opt"))
    return str(kind) if weight == 1 else f"{weight} {kind}"
