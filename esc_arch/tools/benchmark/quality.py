"""PSNR and SSIM of networks by BasicSR's own test pipeline, beside the paper's figures and beside a baseline."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import basicsr.test
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import tensor2img
from basicsr.utils.registry import MODEL_REGISTRY

from esc_arch.data.names import image_name
from esc_arch.errors import UserError
from esc_arch.models import ESCModel
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.metrics import image_measured, measure
from esc_arch.ops.resize import matlab_resize, scale_pair
from esc_arch.options import Options, checked_options, load_options
from esc_arch.suggestions import did_you_mean
from esc_arch.training.distributed import abort_all_ranks

from .data_check import KNOWN_SETS, Folders, check_folders
from .networks import Network
from .paper import paper_tables
from .tables import Cell, Column, Table

__all__ = [
    "BICUBIC",
    "NO_PAPER",
    "PAPER_NAMES",
    "Gains",
    "Outcome",
    "Trial",
    "bicubic",
    "data_problems",
    "gain_table",
    "gains_over",
    "paper_quality",
    "plan",
    "quality_table",
    "run_trials",
]

Metrics = Mapping[str, float]

BICUBIC = "bicubic"
#: What `--paper` takes beside names: no row of the paper.
NO_PAPER = "none"
#: Rows of the paper's tables. Those trained on more than DIV2K end in -DFLIP.
PAPER_NAMES = (
    *paper_tables()["DIV2K"],
    *(f"{name}-DFLIP" for name in paper_tables()["DFLIP"]),
    "ESC-LTE",
)
_LTE = "Arbitrary scale (ESC + LTE, PSNR)"

#: The paper's metrics, with the digits it has, and by how much figures that agree may differ: a unit of the last digit,
#: and half a one for its rounding.
_PAPER_METRICS = {"calculate_psnr": ("psnr", 2), "calculate_ssim": ("ssim", 4)}
_UNITS = 1.5
#: LR images of a set that are compared with HR before a test; `basicsr benchmark data` compares all.
_LOOKED_AT = 3

_FIXED = (
    Column("network"),
    Column("protocol"),
    Column("scale", style="g"),
    Column("dataset", "data set"),
    Column("images", style="d"),
)


@dataclass(frozen=True)
class Trial:
    """An option file to be outcome, checked.

    Attributes:
        file: of the options.
        forced: entries of `--force_yml` that it is run with.
        opt: the options with these.
        network: what `network_g` is.
        paper: the row of the paper that it belongs to; None if there is none.
    """

    file: Path
    forced: Sequence[str]
    opt: Options
    network: Network
    paper: str | None

    @property
    def name(self) -> str:
        return str(self.opt["name"])

    @property
    def protocol(self) -> str:
        return str(self.opt["val"].get("protocol") or PROTOCOLS[0])

    def sections(self) -> dict[str, Options]:
        """The sections of data sets by their names, in the order they are tested in."""
        return {section["name"]: section for _, section in sorted(self.opt["datasets"].items())}

    def scale(self, dataset: str) -> Any:
        """Of a data set: a number, or those of height and width."""
        return self.sections()[dataset].get("scale") or self.network.scale

    def metrics(self, dataset: str) -> dict[str, Options]:
        """The metrics with what `ESCLTEModel` puts in for a border of the data set's scale."""
        border = math.ceil(max(scale_pair(self.scale(dataset))))
        return {
            name: metric | ({"crop_border": border} if metric.get("crop_border") == "scale" else {})
            for name, metric in self.opt["val"]["metrics"].items()
        }

    def picture(self, dataset: str, image: str) -> Path:
        """Where the result for an image is saved."""
        folder, suffix = Path(self.opt["path"]["visualization"], dataset), self.opt["val"].get("suffix") or self.name
        return folder / f"{image}_{suffix}.png"


@dataclass(frozen=True)
class Outcome:
    """What a trial gave on a data set: the metrics of each image, by names of LR files."""

    trial: Trial
    dataset: str
    images: Mapping[str, Metrics]

    def mean(self, metric: str) -> float | None:
        values = [each[metric] for each in self.images.values() if metric in each]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Gains:
    """By how much PSNR (dB) on each image is above that of a baseline, those of most gain first."""

    outcome: Outcome
    images: Mapping[str, float]


# --- what is to be run ----------------------------------------------------------------------------------------------


def plan(
    file: Path,
    *,
    weights: str | None = None,
    protocol: str | None = None,
    device: str = "auto",
    paper: str | None = None,
    save_images: bool = False,
    force_yml: Sequence[str] = (),
    launcher: str = "none",
) -> Trial:
    """Check an option file, and say how it is run.

    Args:
        weights: in place of `path: pretrain_network_g`.
        protocol: one of `PROTOCOLS`; without, the file's own.
        device: auto (the file's), cpu or cuda.
        paper: one of `PAPER_NAMES`, or `NO_PAPER`; without, it is recognised by the network and the name.
        save_images: whether results are needed as pictures.
        force_yml: entries of the user's.

    Raises:
        UserError: something in it cannot be used.
    """
    forced = [*force_yml, *_model_entries(file, force_yml, protocol), "val:per_image=true"]
    if weights is not None:
        forced.append(f"path:pretrain_network_g={json.dumps(weights)}")
    if device != "auto":
        forced.append(f"num_gpu={int(device == 'cuda')}")
    if save_images:
        forced.append("val:save_img=true")
    opt = checked_options(os.getcwd(), False, _arguments(file, forced, launcher))
    if not opt["val"].get("metrics"):
        raise UserError(
            f"{file}: val:metrics: missing; quality is measured by them, such as "
            "psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: true}"
        )
    scale = opt.get("scale") or opt["network_g"].get("upscaling_factor") or 1
    network = Network(opt["name"], opt["network_g"], scale)
    return Trial(file, forced, opt, network, _paper_row(network, opt, paper))


def _model_entries(file: Path, force_yml: Sequence[str], protocol: str | None) -> list[str]:
    """What makes the model of a file one that keeps the figures of each image, with the results of its own."""
    opt = load_options(file, force_yml)
    name = opt.get("model_type")
    is_own = isinstance(name, str) and name in MODEL_REGISTRY and issubclass(MODEL_REGISTRY.get(name), ESCModel)
    if not is_own and name != "SRModel" and protocol is None:
        raise UserError(
            f"{file}: model_type: {name!r} keeps no figures of single images. Choose with --protocol how ESCModel is "
            f"to run the network in its place: {', '.join(PROTOCOLS)}."
        )
    entries = [] if is_own else ["model_type=esc_arch.ESCModel"]
    chosen = protocol or (None if is_own else "srmodel")
    return entries + ([f"val:protocol={chosen}"] if chosen else [])


def _arguments(file: Path, forced: Sequence[str], launcher: str) -> argparse.Namespace:
    return argparse.Namespace(
        opt=str(file), force_yml=list(forced), launcher=launcher, auto_resume=False, debug=False, local_rank=0
    )


def _paper_row(network: Network, opt: Options, asked: str | None) -> str | None:
    if asked == NO_PAPER:
        return None
    if asked is not None:
        if asked not in PAPER_NAMES:
            raise UserError(f"--paper {asked} is not known. {did_you_mean(asked, (*PAPER_NAMES, NO_PAPER))}.")
        return asked
    name = network.published
    weights = str((opt.get("path") or {}).get("pretrain_network_g") or "")
    if name is not None and ("DFLIP" in opt["name"] or "DFLIP" in Path(weights).name):
        name = f"{name}-DFLIP"
    return name if name in PAPER_NAMES else None


# --- running --------------------------------------------------------------------------------------------------------


def run_trials(trials: Sequence[Trial], launcher: str = "none") -> list[Outcome]:
    """Test networks with BasicSR's pipeline, as `basicsr test` does; results are in `results/NAME`, too.

    Returns:
        What each gave on each of its data sets; nothing in processes other than that of rank 0.

    Raises:
        UserError: something in the data or the weights cannot be used.
    """
    # The command line imports this package
    from esc_arch.errors import describe
    from esc_arch.training.pipeline import run_within

    with abort_all_ranks(describe):
        for trial in trials:
            with contextlib.redirect_stdout(sys.stderr), _own_log():  # stdout is for the table
                arguments = _arguments(trial.file, trial.forced, launcher)
                run_within(basicsr.test, basicsr.test.test_pipeline, arguments)
    if os.environ.get("RANK", "0") != "0":
        return []
    return [
        Outcome(trial, name, _read_metrics(Path(trial.opt["path"]["visualization"], "per_image", f"{name}.csv")))
        for trial in trials
        for name in trial.sections()
    ]


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """BasicSR opens its log file once in a process, if nothing was logged before; this lets every run have its own."""
    _close_log()
    try:
        yield
    finally:
        _close_log()


def _close_log() -> None:
    log = logging.getLogger("basicsr")
    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            log.removeHandler(handler)
            handler.close()
    basicsr_logger.initialized_logger.pop("basicsr", None)


def _read_metrics(file: Path) -> dict[str, Metrics]:
    with open(file, encoding="utf-8", newline="") as lines:
        return {row.pop("image"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)}


def bicubic(trial: Trial, dataset: str) -> dict[str, Metrics]:
    """The same metrics of MATLAB's bicubic enlargement, for each image of a data set that has ground truth."""
    metrics = trial.metrics(dataset)
    results: dict[str, Metrics] = {}
    for name, image, gt in bicubic_images(trial, dataset):
        image_measured.set(f"bicubic {name} of {dataset}")
        images = {"img": image, "img2": gt}
        results[name] = {key: float(measure(calculate_metric, images, metric)) for key, metric in metrics.items()}
    return results


def bicubic_images(trial: Trial, dataset: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, bicubic enlargement and ground truth, (H, W, 3) uint8 BGR, of each image that has one."""
    data = build_dataset(copy.deepcopy(trial.sections()[dataset]))  # which takes parts of its options out
    for index in range(len(data)):
        item = data[index]
        if "gt" in item:
            enlarged = matlab_resize(item["lq"][None], tuple(item["gt"].shape[-2:]))
            yield image_name(item["lq_path"]), tensor2img([enlarged]), tensor2img([item["gt"]])


# --- beside the paper -----------------------------------------------------------------------------------------------


def paper_quality(row: str | None, dataset: str, scale: Any) -> Metrics:
    """The paper's psnr (dB) and ssim of a row of `PAPER_NAMES` on a data set, as far as it has them.

    Args:
        dataset: its name, which may end in the scale, such as Set5_x2.
    """
    tables = paper_tables()
    name, down_across = dataset.partition("_x")[0], scale_pair(scale)
    if row is None or down_across[0] != down_across[1]:
        return {}
    key = f"x{down_across[0]:g}"
    if row == "ESC-LTE":
        value = tables[_LTE].get(name, {}).get(key)
        return {} if value is None else {"psnr": value}
    training = "DFLIP" if row.endswith("-DFLIP") else "DIV2K"
    figures = tables[training][row.removesuffix("-DFLIP")].get(key)
    if figures is None or name not in tables["datasets"]:
        return {}
    place = tables["datasets"].index(name)
    return {metric: figures[metric][place] for metric in ("psnr", "ssim")}


def data_problems(trials: Sequence[Trial]) -> list[str]:
    """Why figures on the data of these trials cannot be compared with the paper's, from a look at some images."""
    places = {
        Folders.of(section) for trial in trials if trial.paper is not None for section in trial.sections().values()
    }
    known = sorted((each for each in places if each and each.name in KNOWN_SETS), key=lambda each: (each.name, each.lr))
    return [
        f"{each.name} x{each.scale}: {problem}"
        for each in known
        for problem in check_folders(each, most=_LOOKED_AT).problems
    ]


def quality_table(results: Sequence[Outcome], problems: Sequence[str] = ()) -> Table:
    """Means over data sets beside the paper's; `problems` of the data go below."""
    names = list(dict.fromkeys(name for each in results for name in each.trial.opt["val"]["metrics"]))
    kinds = {
        name: _PAPER_METRICS.get(metric.get("type"))
        for each in results
        for name, metric in each.trial.opt["val"]["metrics"].items()
    }
    columns = [*_FIXED]
    for name in names:
        columns.append(Column(name, name.upper(), ".3f" if kinds[name] == ("psnr", 2) else ".4f"))
        if kind := kinds[name]:
            columns.append(Column(f"{name}_paper", "paper", f".{kind[1]}f"))
            columns.append(Column(f"{name}_difference", "difference", f"+.{max(kind[1], 3)}f"))
    columns += [Column("paper", "row of the paper"), Column("agrees")]
    return Table(columns, [_quality_row(each, kinds) for each in results], notes=[*_notes(results), *problems])


def _quality_row(outcome: Outcome, kinds: Mapping[str, tuple[str, int] | None]) -> list[Cell]:
    trial = outcome.trial
    scale = trial.scale(outcome.dataset)
    shown: Cell = scale if isinstance(scale, int | float) else " x ".join(map(str, scale))
    row: list[Cell] = [trial.name, trial.protocol, shown, outcome.dataset, len(outcome.images)]
    agreeing = []
    for name, kind in kinds.items():
        value = outcome.mean(name)
        row.append(value)
        if kind is not None:
            published = _published(outcome, name)
            difference = None if published is None or value is None else value - published
            row += [published, difference]
            if difference is not None:
                agreeing.append(abs(difference) <= _UNITS * 10 ** -kind[1])
    verdict = ("yes" if all(agreeing) else "no") if agreeing else None
    return [*row, trial.paper or "no published figure", verdict]


def _published(outcome: Outcome, name: str) -> float | None:
    """The paper's figure for a metric, if it is measured as in the paper."""
    trial = outcome.trial
    kind = _PAPER_METRICS.get(str(trial.metrics(outcome.dataset).get(name, {}).get("type")))
    if kind is None or not _is_measured_as_in_the_paper(outcome, name):
        return None
    return paper_quality(trial.paper, outcome.dataset, trial.scale(outcome.dataset)).get(kind[0])


def _is_measured_as_in_the_paper(outcome: Outcome, name: str) -> bool:
    metric = outcome.trial.metrics(outcome.dataset)[name]
    border = math.ceil(max(scale_pair(outcome.trial.scale(outcome.dataset))))
    return metric.get("crop_border") == border and bool(metric.get("test_y_channel"))


def _notes(results: Sequence[Outcome]) -> Iterator[str]:
    yield (
        "The paper: PSNR (dB) and SSIM on Y, as many pixels cropped at the border as the scale is. It agrees where all "
        f"figures differ by at most {_UNITS} units of the last digit the paper has."
    )
    for each in results:
        name, dataset = each.trial.name, each.dataset
        for metric, options in each.trial.metrics(dataset).items():
            if options.get("type") in _PAPER_METRICS and not _is_measured_as_in_the_paper(each, metric):
                yield f"{name}: val:metrics:{metric} is not the paper's metric on {dataset}: no figure is beside it."
    if any(each.trial.protocol == "ensemble" and each.trial.paper for each in results):
        yield "The paper's figures are without self-ensemble."


# --- beside a baseline ----------------------------------------------------------------------------------------------


def gains_over(results: Sequence[Outcome], baselines: Sequence[Outcome] | str) -> list[Gains]:
    """Gains of all results that have PSNR, over another network on the same images, or over bicubic.

    Args:
        baselines: what another network gave, or `BICUBIC`.
    """
    gains = []
    for outcome in results:
        below = _baseline_of(outcome, baselines)
        metric = _psnr_of(outcome.trial)
        differences = {
            name: each[metric] - below[name][metric]
            for name, each in outcome.images.items()
            if metric is not None and metric in below.get(name, {})
        }
        differences = {name: gain for name, gain in differences.items() if math.isfinite(gain)}
        if differences:
            gains.append(Gains(outcome, dict(sorted(differences.items(), key=lambda pair: -pair[1]))))
    return gains


def _baseline_of(outcome: Outcome, baselines: Sequence[Outcome] | str) -> Mapping[str, Metrics]:
    if isinstance(baselines, str):
        return bicubic(outcome.trial, outcome.dataset)
    scale = outcome.trial.scale(outcome.dataset)
    for each in baselines:
        if each.dataset == outcome.dataset and each.trial.scale(each.dataset) == scale:
            return each.images
    return {}


def _psnr_of(trial: Trial) -> str | None:
    """What the option file calls PSNR."""
    metrics = trial.opt["val"]["metrics"]
    return next((name for name, metric in metrics.items() if metric.get("type") == "calculate_psnr"), None)


def gain_table(gains: Sequence[Gains], baseline: str) -> Table:
    """Mean gain in PSNR, and the images of most gain and most loss."""
    columns = (
        Column("network"),
        Column("dataset", "data set"),
        Column("images", style="d"),
        Column("gain_db", f"gain over {baseline} (dB)", "+.3f"),
        Column("better", "images better", "d"),
        Column("most_gained", "best on"),
        Column("most_gained_db", "by (dB)", "+.3f"),
        Column("least_gained", "worst on"),
        Column("least_gained_db", "by (dB)", "+.3f"),
    )
    rows: list[list[Cell]] = []
    for each in gains:
        (best, most), *_ = each.images.items()
        worst, least = list(each.images.items())[-1]
        mean, better = statistics.fmean(each.images.values()), sum(gain > 0 for gain in each.images.values())
        name, dataset = each.outcome.trial.name, each.outcome.dataset
        rows.append([name, dataset, len(each.images), mean, better, best, most, worst, least])
    return Table(columns, rows)
