"""The model type that reproduces the published evaluation, and trains fast and safely."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import imwrite, tensor2img
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from esc_arch.atomic_io import write_atomically
from esc_arch.data.names import image_name
from esc_arch.errors import UserError
from esc_arch.models.comparison import bicubic, comparison_summary, validation_picture, write_comparison
from esc_arch.models.metrics import image_measured, needs_ground_truth
from esc_arch.models.performance import PUBLISHED_MODEL, PerformanceOptions, is_published_model, performance_problems
from esc_arch.ops.float32 import float32_products
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.problems import Problem
from esc_arch.training.distributed import gather_objects
from esc_arch.training.parameter_groups import freeze, parameter_groups
from esc_arch.training.run import current_run, what_is_saved

__all__ = ["PROTOCOLS", "ESCModel", "self_ensemble"]

logger = logging.getLogger("basicsr")

#: Ways to test, by `val: protocol`.
PROTOCOLS = ("published", "srmodel", "ensemble")

#: So many skipped steps in a row mean that the training has diverged.
MOST_SKIPPED = 100
_NEVER = 2**62
#: Iterations after which the published `ESRModel` halves `gradient_clip`.
CLIP_HALVES_AFTER = 50_000


@dataclass
class _Validated:
    """The outcome for one image of a validation set; `index` is its place in the set."""

    index: int
    name: str
    metrics: dict[str, float]
    psnr: tuple[float, float] | None = None  # of bicubic and the result, for the comparison
    bicubic: dict[str, float] | None = None  # metrics of the LQ image enlarged, at a training's first validation
    picture: Any = None  # for TensorBoard


class ESCModel(SRModel):
    """BasicSR's SRModel with the evaluation protocol of the paper. `ESRModel` is its name in published option files.

    The low-resolution image is padded at the bottom and the right by reflection to a multiple of the window, the
    network runs on all of it, and the output is cropped. With several processes each validates its share of the
    images; means are those of one process to the last bit.

    Options beyond SRModel's are listed in docs/training.md ("Options"). Named `ESRModel`, it takes published
    option files: ``train: use_amp`` is ``amp: fp16``, and ``gradient_clip`` is halved after 50,000 iterations.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor
    #: True if validations are logged to metrics.jsonl once they are complete, so that missing ones can be caught up.
    logs_complete_validations = True
    #: By validation set, the metrics of bicubic interpolation, once they are known.
    bicubic: dict[str, dict[str, float]]

    def __init__(self, opt: dict[str, Any]) -> None:
        self.speed = PerformanceOptions.of(opt)
        self.speed.set_globals()
        self._clip_halves = is_published_model(opt)
        if self._clip_halves and opt["is_train"] and self.speed.gradient_clip is not None:
            message = "train: gradient_clip is halved after %d iterations, as published for %s, but not by ESCModel."
            logger.info(message, CLIP_HALVES_AFTER, PUBLISHED_MODEL)
        self.skipped = self._skipped_in_a_row = self._iteration = 0
        self.losses: dict[str, nn.Module] = {}
        self.bicubic = {}
        self._pixel_loss = "l_pix"
        device = "cpu" if opt["num_gpu"] == 0 else "cuda"
        self.scaler = torch.amp.GradScaler(device, enabled=self.speed.amp == "fp16")
        super().__init__(opt)
        self._first_nonfinite = torch.full((), _NEVER, device=self.device)  # the iteration of the first such loss
        if self.speed.channels_last and hasattr(self, "net_g_ema"):
            self.net_g_ema.to(memory_format=torch.channels_last)
        net = self.get_bare_model(self.net_g)
        self.window_size: int = opt["network_g"].get("window_size", getattr(net, "window_size", 1))

    @classmethod
    def option_problems(cls, opt: Mapping[str, Any]) -> Iterator[Problem]:
        """Options of a training that this model cannot use: the key, the value and the fix."""
        network = (opt.get("network_g") or {}).get("type")
        yield from performance_problems(opt, ARCH_REGISTRY.get(network) if network in ARCH_REGISTRY else None)

    # --- training ---------------------------------------------------------------------------------------------------

    def model_to_device(self, net: nn.Module) -> nn.Module:
        if self.is_train:
            if net is self.net_g:
                freeze(net, self.opt["train"])
            net = self.speed.prepare(net.to(self.device), self.device)
        wrapped: nn.Module = super().model_to_device(net)
        return wrapped

    def init_training_settings(self) -> None:
        train = self.opt["train"]
        losses = dict(train.get("losses") or {})
        if losses and not (train.get("pixel_opt") or train.get("perceptual_opt")):
            # SRModel wants one of these two; the first of the others takes its place, under its own name
            name = next(iter(losses))
            train["pixel_opt"], self._pixel_loss = losses.pop(name), f"l_{name}"
        self.losses = {name: build_loss(section).to(self.device) for name, section in losses.items()}
        super().init_training_settings()

    def setup_optimizers(self) -> None:
        options = dict(self.opt["train"]["optim_g"])
        groups = parameter_groups(self.get_bare_model(self.net_g), self.opt["train"])
        self.optimizer_g = self.get_optimizer(options.pop("type"), groups, **options)
        self.optimizers.append(self.optimizer_g)

    def feed_data(self, data: dict[str, Any]) -> None:
        if "gt" not in data and hasattr(self, "gt"):
            del self.gt  # of the last training batch: SRModel would measure the first validation image with it
        super().feed_data(data)
        if self.speed.channels_last:
            self.lq = self.lq.contiguous(memory_format=torch.channels_last)

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        super().update_learning_rate(current_iter, warmup_iter)
        self._iteration = current_iter

    def optimize_parameters(self, current_iter: int) -> None:
        """One step: the batch in `accumulate_grad` parts, then the optimiser, then the average."""
        self.optimizer_g.zero_grad()
        parts = self.speed.accumulate_grad
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            share = slice(part * len(self.lq) // parts, (part + 1) * len(self.lq) // parts)
            # Processes exchange gradients once, with the last part
            wait = part + 1 < parts and isinstance(self.net_g, DistributedDataParallel)
            with self.net_g.no_sync() if wait else contextlib.nullcontext():
                self.output = self.run_network(self.net_g, share)
                losses = self.losses_of(self.output, self.gt[share], parts)
                self.scaler.scale(functools.reduce(torch.add, losses.values())).backward()
            for name, loss in losses.items():
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        stepped = self._step()
        self.log_dict = self.reduce_loss_dict(sums)
        if stepped and self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def run_network(self, net: nn.Module, share: slice) -> Tensor:
        """The network's output for a share of the training batch."""
        output: Tensor = net(self.lq[share])
        return output

    def losses_of(self, output: Tensor, gt: Tensor, parts: int = 1) -> dict[str, Tensor]:
        """All losses by their names in the log; means over images are divided by the number of `parts`."""
        found = [(self._pixel_loss, self.cri_pix, self.cri_pix(output, gt))] if self.cri_pix else []
        if self.cri_perceptual:
            names = ("l_percep", "l_style")
            found += zip(names, (self.cri_perceptual,) * 2, self.cri_perceptual(output, gt), strict=True)
        found += [(f"l_{name}", criterion, criterion(output, gt)) for name, criterion in self.losses.items()]
        return {
            name: loss if parts == 1 or getattr(criterion, "reduction", "mean") == "sum" else loss / parts
            for name, criterion, loss in found
            if loss is not None
        }

    def _step(self) -> bool:
        """The optimiser's step; False if it was skipped, and UserError after too many in a row."""
        clip, skip = self.speed.gradient_clip, self.speed.nonfinite == "skip"
        if clip is not None and self._clip_halves and self._iteration > CLIP_HALVES_AFTER:
            clip /= 2
        if clip is not None or skip:
            self.scaler.unscale_(self.optimizer_g)
            parameters = [p for group in self.optimizer_g.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
            # The gradients, and so the norm, are the same in all processes
            if skip and not norm.isfinite():
                self.scaler.update()
                self.skipped += 1
                self._skipped_in_a_row += 1
                if self._skipped_in_a_row == MOST_SKIPPED:
                    raise self._stopped(f"the gradients of {MOST_SKIPPED} steps in a row were infinite or NaN.")
                return False
        self._skipped_in_a_row = 0
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        return True

    def reduce_loss_dict(self, loss_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses as they are: reading them would make the processor wait for the GPU in every iteration.

        `get_current_log` averages them over the processes when they are wanted.
        """
        losses = {name: loss.detach().mean().float() for name, loss in loss_dict.items()}
        if self.speed.nonfinite == "stop":
            finite = torch.stack(list(losses.values())).isfinite().all()
            now = self._first_nonfinite.clamp(max=self._iteration)
            self._first_nonfinite = torch.where(finite, self._first_nonfinite, now)
        return losses

    def get_current_log(self) -> dict[str, float]:
        """The losses of the last iteration, averaged over the processes; the number of skipped steps, if there are.

        UserError if one since the last call was infinite or NaN (fault 41); it names the last state.
        """
        values, first = torch.stack(list(self.log_dict.values())), self._first_nonfinite.clone()
        if self.opt["dist"]:
            torch.distributed.all_reduce(values)
            values /= self.opt["world_size"]
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        log = dict(zip(self.log_dict, values.tolist(), strict=True))
        if (iteration := int(first)) < _NEVER:
            nonfinite = [f"{name} is {value}" for name, value in log.items() if not math.isfinite(value)]
            raise self._stopped(
                f"{', '.join(nonfinite) or 'a loss is not finite'}.",
                "Lower train: optim_g: lr, look for broken images, or set train: nonfinite: skip before.",
                iteration,
            )
        return log | ({"skipped": self.skipped} if self.skipped else {})

    def _stopped(self, reason: str, advice: str = "", iteration: int | None = None) -> UserError:
        where = self._iteration if iteration is None else iteration
        saved = f"{what_is_saved(self.opt)} Nothing has been saved since."
        return UserError(f"Training stopped at iteration {where}: {reason} {saved} {advice}".rstrip())

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_network(self, net: Any, net_label: str, current_iter: int, param_key: Any = "params") -> None:
        """As BasicSR's; UserError if a weight is infinite or NaN: it does not replace a good network."""
        for each in net if isinstance(net, list) else [net]:
            if not torch.stack([weight.isfinite().all() for weight in each.parameters()]).all():
                raise self._stopped(
                    f"weights of {net_label} are infinite or NaN.",
                    "Lower train: optim_g: lr, or set train: nonfinite: skip.",
                )
        super().save_network(net, net_label, current_iter, param_key)

    def extra_state(self) -> dict[str, Any]:
        """What a training state holds beyond BasicSR's; `load_extra_state` takes it back."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    # --- validation -------------------------------------------------------------------------------------------------

    @property
    def protocol(self) -> str:
        """One of `PROTOCOLS`."""
        return (self.opt.get("val") or {}).get("protocol") or PROTOCOLS[0]

    @property
    def enlarges_evenly(self) -> bool:
        """True if height and width are enlarged alike, so that a transposed image gives the transposed result."""
        return True

    def test(self) -> None:
        if self.protocol == "ensemble":
            self.output = self_ensemble(self.enlarge, self.lq, transpose=self.enlarges_evenly)
        else:
            self.output = self.enlarge(self.lq)

    def enlarge(self, image: Tensor) -> Tensor:
        """The result for LR images: (B, 3, H * scale, W * scale) for (B, 3, H, W)."""
        padded = self.pad(image)
        output = self.evaluate(padded)
        scale = output.shape[-1] // padded.shape[-1]
        return output[..., : image.shape[-2] * scale, : image.shape[-1] * scale]

    def pad(self, image: Tensor) -> Tensor:
        """An LR image (B, 3, H, W) as the network is to see it by the protocol."""
        return image if self.protocol == "srmodel" else reflect_pad_to_multiple(image, self.window_size)

    def evaluate(self, image: Tensor, **query: Tensor) -> Tensor:
        """The output of the averaged network, or without one of the trained one."""
        # Not the wrapper for several processes, which would wait for the others
        net = getattr(self, "net_g_ema", None) or self.get_bare_model(self.net_g)
        training = net.training
        net.eval()
        with torch.no_grad(), float32_products(tf32=False):  # TF32 would show in the last digits of PSNR
            # Not what was compiled: for sizes that are met once, compiling takes longer
            output: Tensor = net._call_impl(image, **query)
        net.train(training)
        return output

    def dist_validation(self, *args: Any, **kwargs: Any) -> None:
        self.nondist_validation(*args, **kwargs)

    def nondist_validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
        """Validate this process's share of the images, and log the scores of all.

        A training that is asked to stop meanwhile leaves the rest out, logs nothing, and repeats it when resumed.
        """
        dataset, rank, run = dataloader.dataset, self.opt["rank"], current_run()
        name = dataset.opt["name"]
        if self.opt["val"].get("metrics") is not None:
            self._initialize_best_metric_results(name)
        indices = range(rank, len(dataset), self.opt["world_size"])
        # With a generator, iterating leaves the random numbers of the process alone
        share = DataLoader(Subset(dataset, indices), pin_memory=dataloader.pin_memory, generator=torch.Generator())
        done: list[_Validated] = []
        with_bar = self.opt["val"].get("pbar") and rank == 0
        for index, data in tqdm(zip(indices, share, strict=True), unit="image", desc=name, disable=not with_bar):
            if run is not None and run.stop:
                break
            done.append(self._validate_image(index, data, current_iter, save_img, name))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # images are larger than patches, and the training needs the memory
        everywhere = [each for share in gather_objects(done) for each in share]
        if len(everywhere) < len(dataset):
            logger.info("The validation on %s was cut off; a resumed run repeats it.", name)
            return
        self._conclude(sorted(everywhere, key=lambda each: each.index), name, current_iter, tb_logger)

    def metric_options(self, metric: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a metric for the current data set."""
        return dict(metric)

    def _validate_image(self, index: int, data: Any, current_iter: Any, save_img: bool, dataset: str) -> _Validated:
        val = self.opt["val"]
        name = image_name(data["lq_path"][0])
        image_measured.set(f"{name} of {dataset}")
        self.feed_data(data)
        self.test()
        visuals = self.get_current_visuals()
        images = {key: tensor2img([visuals[of]]) for key, of in (("img", "result"), ("img2", "gt")) if of in visuals}
        del self.lq, self.output
        folder = Path(self.opt["path"]["visualization"])
        finite = bool(visuals["result"].isfinite().all())
        if not finite:
            problem = f"The result for {name} of {dataset} has infinite or NaN pixels"
            if not self.opt["is_train"]:
                raise UserError(f"{problem}: the weights are broken. Use others.")
            logger.warning("%s: it has no PSNR.", problem)
        if save_img and finite:  # where BasicSR saves it
            suffix = current_iter if self.opt["is_train"] else val.get("suffix") or self.opt["name"]
            file = folder / (name if self.opt["is_train"] else dataset) / f"{name}_{suffix}.png"
            imwrite(images["img"], str(file))
        options = {key: self.metric_options(metric) for key, metric in (val.get("metrics") or {}).items()}
        metrics = {key: float(calculate_metric(images, of)) if finite else math.nan for key, of in options.items()}
        validated = _Validated(index, name, metrics)
        is_first = self.opt["is_train"] and dataset not in self.bicubic and "gt" in visuals and finite
        if paired := {key: of for key, of in options.items() if is_first and needs_ground_truth(of)}:
            images["img"] = bicubic(visuals)
            validated.bicubic = {key: float(calculate_metric(images, of)) for key, of in paired.items()}
        if val.get("comparison") and "gt" in visuals:
            file = folder / "comparison" / dataset / f"{name}.png"
            validated.psnr = write_comparison(file, self.opt["network_g"]["type"], visuals)
        if index < val.get("tb_images", 0):
            validated.picture = validation_picture(visuals, name)
        return validated

    def _conclude(self, done: list[_Validated], dataset: str, iteration: Any, tb_logger: Any) -> None:
        """Mean metrics of all images of a set, to the logs."""
        metrics, folder = self.opt["val"].get("metrics"), Path(self.opt["path"]["visualization"])
        if metrics is not None:
            self.metric_results = {metric: sum(each.metrics[metric] for each in done) / len(done) for metric in metrics}
            for metric, value in self.metric_results.items():
                self._update_best_metric_result(dataset, metric, value, iteration)
            self._keep_if_best(dataset, iteration)
        if all(scores := [each.bicubic or {} for each in done]):
            self.bicubic[dataset] = {key: sum(each[key] for each in scores) / len(scores) for key in scores[0]}
        if self.opt["rank"] != 0:
            return
        if metrics is not None:
            self._log_validation_metric_values(iteration, dataset, tb_logger)
        for each in done:
            if tb_logger and each.picture is not None:
                tb_logger.add_image(f"{dataset}/{each.name}", each.picture, iteration, dataformats="HWC")
        if self.opt["val"].get("per_image"):
            text = io.StringIO()
            rows = [["image", *(metrics or {})], *([each.name, *each.metrics.values()] for each in done)]
            csv.writer(text, lineterminator="\n").writerows(rows)
            file = folder / "per_image" / f"{dataset}.csv"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, text.getvalue().encode())
            except OSError as error:
                if not self.opt["is_train"]:
                    raise
                logger.error("%s was not written: %s. The training goes on.", file, error.strerror)
        if self.opt["val"].get("comparison"):
            compared = [(each.name, *each.psnr) for each in done if each.psnr is not None]
            network = self.opt["network_g"]["type"]
            logger.info(comparison_summary(dataset, network, folder / "comparison" / dataset, compared))

    def _keep_if_best(self, dataset: str, iteration: Any) -> None:
        """Where old checkpoints are removed, the best one must be there, though this iteration may save none."""
        if not self.opt["is_train"] or not self.opt["logger"].get("keep_last"):
            return
        best = any(record["iter"] == iteration for record in self.best_metric_results[dataset].values())
        if best and not Path(self.opt["path"]["models"], f"net_g_{iteration}.pth").is_file():
            nets = {"params": self.net_g, "params_ema": getattr(self, "net_g_ema", None)}
            nets = {key: net for key, net in nets.items() if net is not None}
            self.save_network(list(nets.values()), "net_g", iteration, list(nets))


def self_ensemble(enlarge: Callable[[Tensor], Tensor], image: Tensor, *, transpose: bool = True) -> Tensor:
    """The mean of eight results: of the image, of its mirror images, and of the transposed ones of these.

    Each result is turned back before, and none is clipped or rounded (Timofte et al., CVPR 2016; "+" in tables).
    `enlarge` takes (B, C, H, W), for any H and W; without `transpose` the mean is of four, for networks that enlarge
    height and width differently.
    """
    total = torch.zeros((), device=image.device)
    for flips in ((), (-1,), (-2,), (-2, -1)):
        version = image.flip(flips)
        total = total + enlarge(version).flip(flips)
        if transpose:
            total = total + enlarge(version.mT.contiguous()).mT.flip(flips)
    return total / (8 if transpose else 4)
