"""What can be told wrong about the sections `train:` and `logger:` of an option file before a run."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from esc_arch.losses import ImageLoss
from esc_arch.models import ESCLTEModel, ESCModel
from esc_arch.training import parameter_groups
from esc_arch.training.optimizers import NO_MUON, OPTIMIZERS, build_optimizer
from esc_arch.training.schedulers import SCHEDULERS, TORCH_SCHEDULERS, build_scheduler

from .files import Options
from .section_checks import check_call, entries, is_basicsr_s_or_ours, is_integer, is_whole, sr_model

__all__ = ["check_logger", "check_training"]

_LOSS_KEYS = ("pixel_opt", "perceptual_opt", "gan_opt", "ldl_opt", "feature_matching_opt")
#: Of `train:`, beyond BasicSR's: what is known to `ESCModel` alone.
_OWN_TRAINING = ("losses", "freeze", "lr_factors")
#: They are not called with an image and its target: BasicSR has keys of their own for most.
_NOT_OF_PAIRS = ("PerceptualLoss", "GANLoss", "MultiScaleGANLoss", "GANFeatLoss", "WeightedTVLoss")
_LOGGED_NAMES = ("pix", "percep", "style")
# Lists that must be of one length; those with a default have one entry then.
_LISTS_OF_ONE_LENGTH = {
    CosineAnnealingRestartLR: ("periods", "restart_weights"),
    MultiStepRestartLR: ("restarts", "restart_weights"),
}


def check_training(opt: Options) -> Iterator[str]:
    train = opt.get("train")
    if not train:
        yield "train: missing; training needs this section, with total_iter, optim_g, scheduler and pixel_opt"
        return
    total = train.get("total_iter")
    if not is_whole(total):
        yield f"train:total_iter: {total!r} given; must be a positive whole number, such as 500000"
    model = sr_model(opt)
    losses = [key for key in _LOSS_KEYS if train.get(key)]
    for key in losses:
        yield from _check_loss(f"train:{key}", train[key], entries(LOSS_REGISTRY), model)
    if model is None:
        return
    problems_of = getattr(model, "option_problems", None)  # of a model that has options of its own
    network = opt.get("network_g") or {}
    if problems_of and isinstance(network, dict) and isinstance(network.get("type"), str | None):
        yield from problems_of(opt)
    # A GAN's training is BasicSR's
    own = issubclass(model, ESCModel) and not issubclass(model, SRGANModel)
    if own:
        yield from _check_extra_losses(train.get("losses"), model)
    if issubclass(model, ESCModel):
        yield from parameter_groups.option_problems(train)
    elif is_basicsr_s_or_ours(model):  # another's may read them in its own way
        for key in [key for key in _OWN_TRAINING if train.get(key)]:
            yield f"train:{key}: {opt['model_type']} does not use it; ESCModel does. Change model_type, or remove it"
    if not losses and not (own and train.get("losses")) and is_basicsr_s_or_ours(model.init_training_settings):
        more = ", or losses" if own else ""
        yield f"train: has no loss; give one of pixel_opt and perceptual_opt{more}, such as pixel_opt: {{type: L1Loss}}"
    if is_basicsr_s_or_ours(model.get_optimizer):
        yield from _check_optimizers(train)
    if is_basicsr_s_or_ours(model.setup_schedulers):
        yield from _check_scheduler(train, total)


def _check_loss(path: str, section: Any, known: Mapping[str, Any], model: type[SRModel] | None) -> Iterator[str]:
    problems = list(check_call(path, section, known))
    yield from problems
    loss = None if problems else known[section["type"]]
    if not (inspect.isclass(loss) and issubclass(loss, ImageLoss)):
        return
    options = {key: value for key, value in section.items() if key != "type"}
    for problem in loss.option_problems(**options):
        yield f"{path}: {problem.rstrip('.')}"
    if model is not None and issubclass(model, ESCLTEModel):
        yield f"{path}:type: {section['type']} compares images; {model.__name__} trains on single pixels: use L1Loss"


def _check_extra_losses(section: Any, model: type[SRModel]) -> Iterator[str]:
    if section is None:
        return
    if not isinstance(section, dict):
        yield (
            f"train:losses: {section!r} given; must be a mapping of names, such as "
            "fft: {type: FFTLoss, loss_weight: 0.05}"
        )
        return
    known = {name: entry for name, entry in entries(LOSS_REGISTRY).items() if name not in _NOT_OF_PAIRS}
    for name, loss in section.items():
        path = f"train:losses:{name}"
        if not name.isidentifier() or name in _LOGGED_NAMES:
            yield (
                f"{path}: cannot be the name of a loss; must consist of letters, digits and _, and be none of "
                f"{', '.join(_LOGGED_NAMES)}, which the log has already"
            )
        kind = loss.get("type") if isinstance(loss, dict) else None
        if kind in _NOT_OF_PAIRS:
            yield (
                f"{path}:type: {kind} is not computed from an image and its target alone. Give it by BasicSR's own key "
                f"({', '.join(_LOSS_KEYS)}), or take another: {', '.join(sorted(known))}"
            )
            continue
        yield from _check_loss(path, loss, known, model)
        if isinstance(loss, dict) and loss.get("reduction") == "none":
            yield f"{path}:reduction: 'none' given; must be mean or sum"


def _check_optimizers(train: Options) -> Iterator[str]:
    for key in ["optim_g", *(key for key in train if key.startswith("optim_") and key != "optim_g")]:
        path = f"train:{key}"
        section: Any = train.get(key)
        if isinstance(section, dict) and section.get("type") == "Muon" and "Muon" not in OPTIMIZERS:
            yield f"{path}:type: {NO_MUON}. Use AdamW"
            continue
        # BasicSR hands the learning rate on by position, so it cannot be left to its default.
        problems = list(check_call(path, section, OPTIMIZERS, supplied=["params"], needed=["lr"], registered=False))
        yield from problems
        if not problems:
            try:
                _trial_optimizer(section)
            except Exception as error:  # of any kind: torch does not look at the types of all of its arguments
                yield f"{path}: {section['type']}: {_reason(error)}"


def _trial_optimizer(section: Options) -> torch.optim.Optimizer:
    """An optimiser of nothing: torch's constructors know which values are allowed."""
    options = {key: value for key, value in section.items() if key != "type"}
    return build_optimizer(section["type"], [nn.Parameter(torch.zeros(1, 1))], nets=[], **options)


def _reason(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {text}"


def _check_scheduler(train: Options, total: Any) -> Iterator[str]:
    path = "train:scheduler"
    scheduler: Any = train.get("scheduler")
    supplied = ["optimizer", "last_epoch", "scale_fn"]
    problems = list(check_call(path, scheduler, SCHEDULERS, supplied=supplied, registered=False))
    yield from problems
    if problems:
        return
    if scheduler["type"] in TORCH_SCHEDULERS:
        yield from _check_torch_scheduler(train, total)
        return
    first, second = _LISTS_OF_ONE_LENGTH[SCHEDULERS[scheduler["type"]]]
    lengths = [len(value) if isinstance(value := scheduler.get(key), list) else 1 for key in (first, second)]
    if lengths[0] != lengths[1]:
        yield f"{path}: {first} has {lengths[0]} entries and {second} {lengths[1]}. Give both the same number"
    if first != "periods" or not is_whole(total):
        return
    periods = scheduler["periods"]
    if not isinstance(periods, list) or not all(is_whole(period) for period in periods):
        yield f"{path}:periods: {periods!r} given; must be a list of iterations, such as [{int(total)}]"
    elif sum(periods) < total - 1:  # it is first stepped in the second iteration
        yield f"{path}:periods: {periods} end before train:total_iter {total}. Make their sum as large"


def _check_torch_scheduler(train: Options, total: Any) -> Iterator[str]:
    path, options = "train:scheduler", dict(train["scheduler"])
    kind = options.pop("type")
    try:
        optimizer = _trial_optimizer(train["optim_g"])
    except Exception:  # told by _check_optimizers
        return
    try:
        schedule = build_scheduler(kind, optimizer, **options)
    except Exception as error:
        yield f"{path}: {kind}: {_reason(error)}"
        return
    steps = getattr(schedule, "total_steps", None)
    if steps is not None and is_whole(total) and steps < total:
        yield f"{path}: {kind} ends after {steps} iterations, before train:total_iter {total}. Raise total_steps"


def check_logger(opt: Options) -> Iterator[str]:
    """The `logger:` section, and what of `val:` goes there."""
    options, val = opt.get("logger") or {}, opt.get("val") or {}
    for section, key in (("logger", "print_freq"), ("logger", "save_checkpoint_freq"), ("val", "val_freq")):
        value = (opt.get(section) or {}).get(key, 1)
        if not is_whole(value):
            yield f"{section}:{key}: {value!r} given; must be a positive whole number of iterations, such as 5000"
    keep = options.get("keep_last")
    if keep is not None and not is_integer(keep, least=1):
        yield f"logger:keep_last: {keep!r} given; must be ~ (keep all checkpoints) or a positive integer, such as 3"
    yield from _check_validation_pictures(opt, val.get("tb_images", 0))
    yield from _check_wandb(opt, options.get("wandb"))


def _check_validation_pictures(opt: Options, count: Any) -> Iterator[str]:
    path, model = "val:tb_images", sr_model(opt)
    if not is_integer(count, least=0):
        yield f"{path}: {count!r} given; must be how many images of each validation set TensorBoard is to show, or 0"
    elif count and model is not None and is_basicsr_s_or_ours(model) and not issubclass(model, ESCModel):
        yield f"{path}: {opt['model_type']} does not use it; ESCModel does. Change model_type, or remove it"


def _check_wandb(opt: Options, section: Any) -> Iterator[str]:
    path = "logger:wandb"
    if not isinstance(section, dict | None):
        yield f"{path}: {section!r} given; must be a mapping with project and resume_id"
        return
    project, run_id = ((section or {}).get(key) for key in ("project", "resume_id"))
    if project is None or "debug" in opt["name"]:  # BasicSR does not start it then
        return
    if not isinstance(project, str) or not project:
        yield f"{path}:project: {project!r} given; must be text, in quotes if it looks like a number, or ~ (no wandb)"
    if run_id is not None and not isinstance(run_id, str):
        yield f"{path}:resume_id: {run_id!r} given; must be the id of a run, as text: put it in quotes"
    if (opt.get("logger") or {}).get("use_tb_logger") is not True:
        yield (
            f"{path}:project: {project!r} given, but TensorBoard is off, and wandb takes its figures from there. Set "
            "logger:use_tb_logger: true, or project: ~"
        )
    if (found := importlib.util.find_spec("wandb")) is None or found.origin is None:  # no origin: a folder of that name
        yield (
            f"{path}:project: {project!r} given, but wandb is not installed. Install it with "
            'pip install "esc-arch[wandb]", or set project: ~'
        )
