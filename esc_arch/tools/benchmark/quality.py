"""Networks tested by BasicSR's own pipeline, with the metrics of each image."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import basicsr.test
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import tensor2img

from esc_arch.data.names import image_name
from esc_arch.errors import UserError, describe
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.metrics import image_measured, measure
from esc_arch.names import did_you_mean
from esc_arch.ops.resize import matlab_resize, scale_pair
from esc_arch.options import Options, checked_options, load_options
from esc_arch.options.section_checks import is_esc_model
from esc_arch.training.distributed import abort_all_ranks
from esc_arch.training.pipeline import run_within

from .networks import NetworkSpec
from .paper import PAPER_ROWS

__all__ = ["NO_PAPER", "Evaluation", "SetScores", "bicubic_images", "bicubic_scores", "plan_evaluation", "run_all"]

#: Value of `--paper` for no comparison.
NO_PAPER = "none"


@dataclass(frozen=True)
class Evaluation:
    """A checked option file, to be tested, with the arguments of `basicsr test` and the complete options.

    `paper` is the row of the paper that it belongs to; None if there is none.
    """

    file: Path
    arguments: argparse.Namespace
    opt: Options
    network: NetworkSpec
    paper: str | None

    @property
    def name(self) -> str:
        return str(self.opt["name"])

    @property
    def protocol(self) -> str:
        return str(self.opt["val"].get("protocol") or PROTOCOLS[0])

    @property
    def datasets(self) -> dict[str, Options]:
        """The sections of data sets by their names, in the order they are tested in."""
        return {section["name"]: section for _, section in sorted(self.opt["datasets"].items())}

    def result_file(self, dataset: str, image: str) -> Path:
        """Where the result for an image is saved."""
        suffix = self.opt["val"].get("suffix") or self.name
        return Path(self.opt["path"]["visualization"], dataset, f"{image}_{suffix}.png")


@dataclass(frozen=True)
class SetScores:
    """Metrics of each image of a data set, by names of LR files."""

    evaluation: Evaluation
    dataset: str
    images: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, evaluation: Evaluation, dataset: str) -> SetScores:
        """What `val: per_image` of a test has left."""
        file = Path(evaluation.opt["path"]["visualization"], "per_image", f"{dataset}.csv")
        with open(file, encoding="utf-8", newline="") as lines:
            rows = {row.pop("image"): row for row in csv.DictReader(lines)}
        numbers = {image: {name: float(value) for name, value in row.items()} for image, row in rows.items()}
        return cls(evaluation, dataset, numbers)

    @property
    def scale(self) -> Any:
        """A number, or those of height and width."""
        return self.evaluation.datasets[self.dataset].get("scale") or self.evaluation.network.scale

    @property
    def border(self) -> int:
        """The paper's crop_border: as many pixels as the scale."""
        return math.ceil(max(scale_pair(self.scale)))

    @property
    def metrics(self) -> dict[str, Options]:
        """The metrics with the border that `ESCLTEModel` uses for `crop_border: scale`."""
        return {
            name: metric | {"crop_border": self.border} if metric.get("crop_border") == "scale" else metric
            for name, metric in self.evaluation.opt["val"]["metrics"].items()
        }

    @property
    def psnr(self) -> str:
        """The name of the metric that is PSNR; empty if there is none."""
        return next((name for name, metric in self.metrics.items() if metric["type"] == "calculate_psnr"), "")

    def mean(self, metric: str) -> float | None:
        values = [scores[metric] for scores in self.images.values() if metric in scores]
        return statistics.fmean(values) if values else None


def plan_evaluation(
    file: Path,
    force_yml: Sequence[str] = (),
    *,
    protocol: str | None = None,
    paper: str | None = None,
    launcher: str = "none",
) -> Evaluation:
    """Check an option file, and decide how to run it: with a model that keeps the metrics of each image.

    Args:
        force_yml: entries of `--force_yml`.
        protocol: one of `PROTOCOLS`; default: the file's.
        paper: one of `PAPER_ROWS`, or `NO_PAPER`; default: recognised by the network and the name.

    Raises:
        UserError: something in it cannot be used.
    """
    if paper not in (None, NO_PAPER, *PAPER_ROWS):
        raise UserError(f"--paper {paper} is not known. {did_you_mean(paper, (*PAPER_ROWS, NO_PAPER))}.")
    forced = [*force_yml, "val:per_image=true"]
    opt = load_options(file, force_yml)
    if not is_esc_model(opt):
        if opt.get("model_type") == "SRModel":
            protocol = protocol or "srmodel"
        if protocol is None:
            raise UserError(
                f"{file}: model_type: {opt.get('model_type')!r} does not keep the scores of each image. Choose with "
                f"--protocol how ESCModel is to run the network instead: {', '.join(PROTOCOLS)}."
            )
        forced.append("model_type=esc_arch.ESCModel")
    if protocol is not None:
        forced.append(f"val:protocol={protocol}")
    arguments = argparse.Namespace(
        opt=str(file), force_yml=forced, launcher=launcher, auto_resume=False, debug=False, local_rank=0
    )
    opt = checked_options(os.getcwd(), False, arguments)
    if not opt["val"].get("metrics"):
        raise UserError(
            f"{file}: val:metrics is missing; give the metrics to measure, such as "
            "psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: true}"
        )
    scale = opt.get("scale") or opt["network_g"].get("upscaling_factor") or 1
    network = NetworkSpec(opt["name"], opt["network_g"], scale)
    if paper is None:
        weights = Path(str((opt.get("path") or {}).get("pretrain_network_g")))
        is_dflip = "DFLIP" in opt["name"] or "DFLIP" in weights.name
        paper = f"{network.published}{'-DFLIP' * is_dflip}"
    return Evaluation(file, arguments, opt, network, paper if paper in PAPER_ROWS else None)


def run_all(evaluations: Sequence[Evaluation]) -> list[SetScores]:
    """Test networks with BasicSR's pipeline, as `basicsr test` does; results are in `results/NAME`, too.

    Returns:
        The scores of each on each of its data sets; nothing in processes other than that of rank 0.

    Raises:
        UserError: something in the data or the weights cannot be used.
    """
    with abort_all_ranks(describe), contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        for each in evaluations:
            _reset_log()
            run_within(basicsr.test, basicsr.test.test_pipeline, each.arguments)
        _reset_log()
    if os.environ.get("RANK", "0") != "0":
        return []
    return [SetScores.read(each, name) for each in evaluations for name in each.datasets]


def _reset_log() -> None:
    """Close BasicSR's log file, so that the next run opens its own."""
    log = logging.getLogger("basicsr")
    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            log.removeHandler(handler)
            handler.close()
    basicsr_logger.initialized_logger.pop("basicsr", None)


def bicubic_scores(scores: SetScores) -> SetScores:
    """The same metrics of MATLAB's bicubic enlargement, for each image that has ground truth."""
    images: dict[str, dict[str, float]] = {}
    for name, image, gt in bicubic_images(scores):
        image_measured.set(f"bicubic {name} of {scores.dataset}")
        images[name] = {
            key: float(measure(calculate_metric, {"img": image, "img2": gt}, metric))
            for key, metric in scores.metrics.items()
        }
    return replace(scores, images=images)


def bicubic_images(scores: SetScores) -> Iterator[tuple[str, Any, Any]]:
    """Name, bicubic enlargement and ground truth, (H, W, 3) uint8 BGR, of each image that has one."""
    # A copy, because the data set takes parts of its options out
    data = build_dataset(copy.deepcopy(scores.evaluation.datasets[scores.dataset]))
    for index in range(len(data)):
        item = data[index]
        if "gt" in item:
            enlarged = matlab_resize(item["lq"][None], tuple(item["gt"].shape[-2:]))
            yield image_name(item["lq_path"]), tensor2img([enlarged]), tensor2img([item["gt"]])
