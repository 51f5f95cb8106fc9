"""What can be wrong with the sections `train:` and `logger:` of an option file, beyond single values."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from esc_arch.losses import ImageLoss
from esc_arch.models import ESCLTEModel, ESCModel
from esc_arch.problems import Problem, wrong_value
from esc_arch.training import parameter_groups
from esc_arch.training.optimizers import NO_MUON, OPTIMIZERS, build_optimizer
from esc_arch.training.schedulers import SCHEDULERS, TORCH_SCHEDULERS, build_scheduler

from .files import Options
from .keys import KEYS
from .section_checks import check_call, entries, is_known_code, missing_keys, sr_model

__all__ = ["check_logger", "check_training"]

_LOSS_KEYS = ("pixel_opt", "perceptual_opt", "gan_opt", "ldl_opt", "feature_matching_opt")
#: They are not called with an image and its target: BasicSR has keys of their own for most.
_NOT_OF_PAIRS = ("PerceptualLoss", "GANLoss", "MultiScaleGANLoss", "GANFeatLoss", "WeightedTVLoss")
_LOGGED_NAMES = ("pix", "percep", "style")
#: The share of the weights before training that the average of a training from scratch may have at its end.
MOST_UNTRAINED = 0.1


def check_training(opt: Options) -> Iterator[Problem]:
    train = opt.get("train")
    if not train:
        yield Problem(
            "train", "missing; training needs this section, with total_iter, optim_g, scheduler and pixel_opt"
        )
        return
    yield from missing_keys("train", train, KEYS["train"], ["total_iter"])
    model = sr_model(opt)
    losses = [key for key in _LOSS_KEYS if train.get(key)]
    for key in losses:
        yield from _check_loss(f"train:{key}", train[key], entries(LOSS_REGISTRY), model)
    if model is None:
        return
    takes_losses = issubclass(model, ESCModel) and not issubclass(model, SRGANModel)  # a GAN's training is BasicSR's
    if takes_losses:
        yield from _check_extra_losses(train.get("losses"), model)
    if issubclass(model, ESCModel):
        network = opt.get("network_g") or {}
        if isinstance(network, dict) and isinstance(network.get("type"), str | None):
            yield from model.option_problems(opt)
        yield from parameter_groups.option_problems(train)
    if not losses and not (takes_losses and train.get("losses")) and is_known_code(model.init_training_settings):
        more = ", or losses" if takes_losses else ""
        message = f"has no loss; give one of pixel_opt and perceptual_opt{more}, such as pixel_opt: {{type: L1Loss}}"
        yield Problem("train", message)
    if is_known_code(model.get_optimizer):
        for key in ["optim_g", *(key for key in train if key.startswith("optim_") and key != "optim_g")]:
            yield from _check_optimizer(f"train:{key}", train.get(key))
    if is_known_code(model.setup_schedulers):
        yield from _check_scheduler(train)
    if all(KEYS["train"][key].accepts(train.get(key, 0)) for key in ("total_iter", "warmup_iter", "ema_decay")):
        yield from _check_length(train, bool((opt.get("path") or {}).get("pretrain_network_g")))


def _check_length(train: Options, is_pretrained: bool) -> Iterator[Problem]:
    """Warnings of what a short training does not get to."""
    total, warmup, decay = (train.get(key) or 0 for key in ("total_iter", "warmup_iter", "ema_decay"))
    if warmup > total:
        message = f"{warmup} given, more than total_iter {total}: the learning rate does not get to lr. Lower it"
        yield Problem("train:warmup_iter", message, "warning")
    untrained = 0 if is_pretrained else decay**total
    if untrained > MOST_UNTRAINED:
        message = (
            f"{decay} given: after total_iter {total} the average still has {untrained:.0%} of the weights before "
            f"training, and scores worse than the network. Give at most {max(0, 1 - 10 / total):.4g}; 0 is no average"
        )
        yield Problem("train:ema_decay", message, "warning")


def _check_loss(path: str, section: Any, known: Mapping[str, Any], model: type[SRModel] | None) -> Iterator[Problem]:
    problems = list(check_call(path, section, known, table=KEYS["train:losses:*"]))
    yield from problems
    loss = None if problems else known[section["type"]]
    if not (inspect.isclass(loss) and issubclass(loss, ImageLoss)):
        return
    options = {key: value for key, value in section.items() if key != "type"}
    for message in loss.option_problems(**options):
        yield Problem(path, message.rstrip("."))
    if model is not None and issubclass(model, ESCLTEModel):
        message = f"{section['type']} compares images; {model.__name__} trains on single pixels: use L1Loss"
        yield Problem(f"{path}:type", message)


def _check_extra_losses(section: Any, model: type[SRModel]) -> Iterator[Problem]:
    known = {name: entry for name, entry in entries(LOSS_REGISTRY).items() if name not in _NOT_OF_PAIRS}
    for name, loss in section.items() if isinstance(section, dict) else ():
        path = f"train:losses:{name}"
        if not name.isidentifier() or name in _LOGGED_NAMES:
            taken = f"be none of {', '.join(_LOGGED_NAMES)}, which the log has already"
            yield Problem(path, f"cannot be the name of a loss; must consist of letters, digits and _, and {taken}")
        kind = loss.get("type") if isinstance(loss, dict) else None
        if kind in _NOT_OF_PAIRS:
            message = (
                f"{kind} is not computed from an image and its target alone. Give it by BasicSR's own key "
                f"({', '.join(_LOSS_KEYS)}), or take another: {', '.join(sorted(known))}"
            )
            yield Problem(f"{path}:type", message)
        else:
            yield from _check_loss(path, loss, known, model)


def _check_optimizer(path: str, section: Any) -> Iterator[Problem]:
    if isinstance(section, dict) and section.get("type") == "Muon" and "Muon" not in OPTIMIZERS:
        yield Problem(f"{path}:type", f"{NO_MUON}. Use AdamW")
        return
    # BasicSR hands the learning rate on by position, so it cannot be left to its default.
    problems = list(check_call(path, section, OPTIMIZERS, supplied=["params"], needed=["lr"], registered=False))
    yield from problems
    if not problems:
        for key, value in section.items():
            if isinstance(value, float) and not math.isfinite(value):
                yield wrong_value(f"{path}:{key}", value, "a finite number")
        try:
            _trial_optimizer(section)
        except Exception as error:  # of any kind: torch does not look at the types of all of its arguments
            yield Problem(path, f"{section['type']}: {_reason(error)}")


def _trial_optimizer(section: Options) -> torch.optim.Optimizer:
    """An optimiser of nothing: torch's constructors know which values are allowed."""
    options = {key: value for key, value in section.items() if key != "type"}
    return build_optimizer(section["type"], [nn.Parameter(torch.zeros(1, 1))], nets=[], **options)


def _reason(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {text}"


def _check_scheduler(train: Options) -> Iterator[Problem]:
    path, section, total = "train:scheduler", train.get("scheduler"), train.get("total_iter")
    supplied, table = ["optimizer", "last_epoch", "scale_fn"], KEYS["train:scheduler"]
    problems = list(check_call(path, section, SCHEDULERS, supplied=supplied, registered=False, table=table))
    yield from problems
    if problems or section is None:
        return
    options = {key: value for key, value in section.items() if key != "type"}
    kind, periods = section["type"], options.get("periods")
    try:
        optimizer = _trial_optimizer(train["optim_g"])
    except Exception:  # told by _check_optimizer
        return
    try:
        is_torch = kind in TORCH_SCHEDULERS
        schedule = build_scheduler(kind, optimizer, **options) if is_torch else SCHEDULERS[kind](optimizer, **options)
    except Exception as error:
        yield Problem(path, f"{kind}: {_reason(error)}")
        return
    # BasicSR first steps a schedule in the second iteration
    last: Any = sum(periods) + 1 if periods else getattr(schedule, "total_steps", None)
    if last is not None and KEYS["train"]["total_iter"].accepts(total) and last < total:
        longer = "periods" if periods else "total_steps"
        yield Problem(path, f"{kind} ends after {last} iterations, before train:total_iter {total}. Raise {longer}")


def check_logger(opt: Options) -> Iterator[Problem]:
    logger = opt.get("logger") or {}
    wandb = logger.get("wandb")
    project = wandb.get("project") if isinstance(wandb, dict) else None
    if project is None or "debug" in opt["name"]:  # BasicSR does not start wandb then
        return
    path = "logger:wandb:project"
    if logger.get("use_tb_logger") is not True:
        reason = "TensorBoard is off, and wandb takes its numbers from there. Set logger:use_tb_logger: true"
        yield Problem(path, f"{project!r} given, but {reason}, or project: ~")
    if (found := importlib.util.find_spec("wandb")) is None or found.origin is None:  # no origin: a folder of that name
        reason = 'wandb is not installed. Install it with pip install "esc-arch[wandb]"'
        yield Problem(path, f"{project!r} given, but {reason}, or set project: ~")
