"""Networks tested by BasicSR's own pipeline: the scores of each image, and gains over a baseline."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import basicsr.test
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import tensor2img

from esc_arch.data.names import image_name
from esc_arch.errors import UserError, describe
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.models.metrics import image_measured, measure
from esc_arch.ops.resize import matlab_resize, scale_pair
from esc_arch.options import Options, checked_options, load_options
from esc_arch.options.section_checks import is_esc_model
from esc_arch.training.distributed import abort_all_ranks
from esc_arch.training.pipeline import run_within

from .networks import NetworkSpec
from .paper import PAPER_ROWS

__all__ = ["Evaluation", "Gains", "SetScores", "bicubic_images", "compute_gains", "plan_evaluation", "run_all"]


@dataclass(frozen=True)
class Evaluation:
    """A checked option file, to be tested, with the arguments of `basicsr test` and the complete options.

    `paper` is the row of the paper that it belongs to; None if there is none.
    """

    arguments: argparse.Namespace
    opt: Options
    network: NetworkSpec
    paper: str | None

    @property
    def file(self) -> Path:
        return Path(self.arguments.opt)

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def protocol(self) -> str:
        return str(self.opt["val"].get("protocol") or PROTOCOLS[0])

    def result_file(self, dataset: str, image: str) -> Path:
        """Where the result for an image is saved."""
        suffix = self.opt["val"].get("suffix") or self.name
        return Path(self.opt["path"]["visualization"], dataset, f"{image}_{suffix}.png")

    def read_scores(self) -> list[SetScores]:
        """What `val: per_image` of a test has left, in the order in which data sets are tested."""
        scores = []
        for _, section in sorted(self.opt["datasets"].items()):
            file = Path(self.opt["path"]["visualization"], "per_image", f"{section['name']}.csv")
            with open(file, encoding="utf-8", newline="") as lines:
                rows = {row.pop("image"): row for row in csv.DictReader(lines)}
            images = {image: {name: float(value) for name, value in row.items()} for image, row in rows.items()}
            scores.append(SetScores(self, section, images))
        return scores


@dataclass(frozen=True)
class SetScores:
    """Metrics of each image of a data set, by names of LR files; `section` is that of the data set."""

    evaluation: Evaluation
    section: Options
    images: Mapping[str, Mapping[str, float]]

    @property
    def dataset(self) -> str:
        return str(self.section["name"])

    @property
    def scale(self) -> Any:
        """A number, or those of height and width."""
        return self.section.get("scale") or self.evaluation.network.scale

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
    def psnr_metric(self) -> str:
        """The name of the metric that is PSNR; empty if there is none."""
        return next((name for name, metric in self.metrics.items() if metric["type"] == "calculate_psnr"), "")

    @property
    def psnr(self) -> dict[str, float]:
        """PSNR (dB) of each image; empty if it was not measured."""
        metric = self.psnr_metric
        return {image: scores[metric] for image, scores in self.images.items()} if metric else {}


def plan_evaluation(
    file: Path,
    force_yml: Sequence[str] = (),
    *,
    protocol: str | None = None,
    paper: str | None = None,
    launcher: str = "none",
) -> Evaluation:
    """Check an option file, and decide how to run it: with a model that keeps the metrics of each image.

    `protocol` is one of `PROTOCOLS` (default: the file's); `paper` one of `PAPER_ROWS`, or another text for none
    (default: recognised by the network and the name). UserError if something in the file cannot be used.
    """
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
    network = NetworkSpec(str(opt["name"]), opt["network_g"], scale)
    if paper is None:
        weights = Path(str((opt.get("path") or {}).get("pretrain_network_g")))
        is_dflip = "DFLIP" in network.name or "DFLIP" in weights.name
        paper = f"{network.published}{'-DFLIP' * is_dflip}"
    return Evaluation(arguments, opt, network, paper if paper in PAPER_ROWS else None)


def run_all(evaluations: Sequence[Evaluation]) -> None:
    """Test networks as `basicsr test` does; results are in `results/NAME`, too.

    UserError if something in the data or the weights cannot be used.
    """
    with abort_all_ranks(describe), contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        for each in evaluations:
            _reset_log()
            run_within(basicsr.test, basicsr.test.test_pipeline, each.arguments)
        _reset_log()


def _reset_log() -> None:
    """Close BasicSR's log file, so that the next run opens its own."""
    log = logging.getLogger("basicsr")
    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            log.removeHandler(handler)
            handler.close()
    basicsr_logger.initialized_logger.pop("basicsr", None)


class Gains(NamedTuple):
    """Differences in PSNR (dB) from a baseline on each image, the largest first."""

    scores: SetScores
    images: Mapping[str, float]


def compute_gains(results: Sequence[SetScores], baseline: Evaluation | None) -> list[Gains]:
    """Gains of all results that have PSNR, over another network on the same images, or over bicubic (None)."""
    others = [] if baseline is None else baseline.read_scores()
    gains = []
    for each in results:
        same = (other.psnr for other in others if (other.dataset, other.scale) == (each.dataset, each.scale))
        below = _bicubic_psnr(each) if baseline is None else next(same, {})
        differences = {image: psnr - below[image] for image, psnr in each.psnr.items() if image in below}
        finite = [pair for pair in differences.items() if math.isfinite(pair[1])]
        if finite:
            gains.append(Gains(each, dict(sorted(finite, key=lambda pair: -pair[1]))))
    return gains


def _bicubic_psnr(scores: SetScores) -> dict[str, float]:
    psnr = {}
    if metric := scores.metrics.get(scores.psnr_metric):
        for name, image, gt in bicubic_images(scores):
            image_measured.set(f"bicubic {name} of {scores.dataset}")
            psnr[name] = float(measure(calculate_metric, {"img": image, "img2": gt}, metric))
    return psnr


def bicubic_images(scores: SetScores) -> Iterator[tuple[str, Any, Any]]:
    """Name, MATLAB's bicubic enlargement and ground truth, (H, W, 3) uint8 BGR, of each image of a paired set."""
    data = build_dataset(copy.deepcopy(scores.section))  # a copy, because the data set takes parts of its options out
    for index in range(len(data)):
        item = data[index]
        enlarged = matlab_resize(item["lq"][None], tuple(item["gt"].shape[-2:]))
        yield image_name(item["lq_path"]), tensor2img([enlarged]), tensor2img([item["gt"]])
