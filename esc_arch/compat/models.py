"""Patches for `basicsr.models` and `basicsr.metrics`: what models are built from, save, load and validate."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.dist_util import get_dist_info, master_only
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esc_arch.atomic_io import replacing, writing_to
from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights
from esc_arch.data.names import image_name
from esc_arch.errors import UserError
from esc_arch.training.distributed import wait_for_all
from esc_arch.training.optimizers import build_optimizer
from esc_arch.training.run import current_run
from esc_arch.training.schedulers import BASICSR_SCHEDULERS, build_scheduler
from esc_arch.training.states import apply_state, prune, training_state

from .failures import rescuing
from .patches import Original, patch

_BASE_MODEL, _SR_MODEL = "basicsr.models.base_model", "basicsr.models.sr_model"

logger = logging.getLogger("basicsr")


@patch(_BASE_MODEL, "BaseModel.__init__", "programs may build models from options of their own")
def init(original: Original, self: Any, opt: dict[str, Any]) -> None:
    rank, world_size = get_dist_info()
    # What the command line puts there, and patches read; BasicSR's own models do without most of it
    for key, value in {"rank": rank, "world_size": world_size, "dist": world_size > 1, "logger": {}}.items():
        opt.setdefault(key, value)
    original(self, opt)


@patch(_BASE_MODEL, "BaseModel.get_optimizer", "every optimiser of torch.optim, AdamW among them")
def get_optimizer(_: Original, self: Any, optim_type: str, params: Any, lr: float, **kwargs: Any) -> Any:
    nets = [entry for entry in vars(self).values() if isinstance(entry, nn.Module)]
    return build_optimizer(optim_type, params, nets=nets, lr=lr, **kwargs)


@patch(_BASE_MODEL, "BaseModel.setup_schedulers", "every schedule of torch.optim.lr_scheduler")
def setup_schedulers(original: Original, self: Any) -> None:
    options = dict(self.opt["train"]["scheduler"])
    kind = options.pop("type")
    if kind in BASICSR_SCHEDULERS:
        original(self)
    else:
        self.schedulers += [build_scheduler(kind, optimizer, **options) for optimizer in self.optimizers]


@patch(_BASE_MODEL, "BaseModel.get_bare_model", "a network wrapped by torch.compile can be saved")
def get_bare_model(original: Original, self: Any, net: nn.Module) -> nn.Module:
    inner: Any = original(self, net)
    inner = getattr(inner, "_orig_mod", inner)
    return net if inner is net else self.get_bare_model(inner)  # either wrapper may be the outer one


@patch(_BASE_MODEL, "BaseModel.model_to_device", "distributed training on CPUs")
def model_to_device(original: Original, self: Any, net: nn.Module) -> nn.Module:
    if not self.opt["dist"] or self.device.type != "cpu":
        return original(self, net)
    find_unused = self.opt.get("find_unused_parameters", False)
    return DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)


@patch(_BASE_MODEL, "BaseModel.model_ema", "the averaged network has the buffers of the trained one")
@torch.no_grad()
def model_ema(_: Original, self: Any, decay: float = 0.999) -> None:
    trained = self.get_bare_model(self.net_g)
    # BasicSR's arithmetic in one call for all tensors, which on a GPU is one kernel for hundreds
    averaged = list(self.net_g_ema.parameters())
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, list(trained.parameters()), alpha=1 - decay)
    buffers = dict(trained.named_buffers())
    for name, buffer in self.net_g_ema.named_buffers():
        buffer.copy_(buffers[name])


@patch(_BASE_MODEL, "BaseModel.load_network", "checkpoints of every kind are loaded, or it is said what does not fit")
def load_network(
    _: Original, self: Any, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
) -> None:
    net = self.get_bare_model(net)
    weights = select_weights(read_checkpoint(load_path), param_key, load_path)
    load_weights(net, weights, strict=strict, source=load_path)
    logger.info("Loaded %s from %s.", type(net).__name__, load_path)


@patch(_BASE_MODEL, "BaseModel.save_network", "checkpoints are written whole or not at all")
@master_only
def save_network(
    _: Original, self: Any, net: Any, net_label: str, current_iter: int, param_key: str | list[str] = "params"
) -> None:
    nets = [net] if isinstance(net, nn.Module) else net
    keys = [param_key] if isinstance(param_key, str) else param_key
    content = {
        key: {name: tensor.cpu().contiguous() for name, tensor in self.get_bare_model(each).state_dict().items()}
        for key, each in zip(keys, nets, strict=True)
    }
    label = "latest" if current_iter == -1 else current_iter
    path = Path(self.opt["path"]["models"], f"{net_label}_{label}.pth")
    _save_atomically(content, path, is_last=current_iter == -1)


@patch(_BASE_MODEL, "BaseModel.save_training_state", "states are whole, and have all to go on from")
def save_training_state(_: Original, self: Any, epoch: int, current_iter: int) -> None:
    if current_iter == -1:  # the end of training: there is nothing to go on with
        if self.opt["rank"] == 0:
            prune(self)
        return
    content = training_state(self, epoch, current_iter)
    if (run := current_run()) is not None:
        run.saved_iteration = current_iter
    path = Path(self.opt["path"]["training_states"], f"{current_iter}.state")
    if self.opt["rank"] == 0 and _save_atomically(content, path, is_last=False):
        prune(self)


def _save_atomically(content: Any, path: Path, *, is_last: bool) -> bool:
    """Write a checkpoint whole or not at all; True if it was written.

    A disk that is full for a while must not end a training of days: the failure is logged, and the next checkpoint
    tries again. Only the last one raises.
    """
    try:
        with writing_to(path.parent), replacing(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's writer reports a full disk so
                raise OSError(str(error).splitlines()[0]) from error
    except UserError as error:
        message = f"{path.name} was not saved, and the one before is untouched. {error}"
        if is_last:
            raise UserError(message) from error
        logger.error(message)
        return False
    return True


@patch(_BASE_MODEL, "BaseModel.resume_training", "a resumed run is as if it had not stopped")
def resume_training(original: Original, self: Any, resume_state: dict[str, Any]) -> None:
    apply_state(self, resume_state, original)


@patch(_BASE_MODEL, "BaseModel.validation", "none is done twice, one that fails loses no iteration, all wait for it")
def validation(original: Original, self: Any, dataloader: Any, current_iter: Any, *args: Any, **kwargs: Any) -> None:
    run = current_run()
    if run is None or run.begins_validation(dataloader, current_iter):
        with rescuing():
            original(self, dataloader, current_iter, *args, **kwargs)
        wait_for_all()  # BasicSR's models validate in one process


@patch(_SR_MODEL, "SRModel.nondist_validation", "images' names never lead out of the output folder")
def nondist_validation(original: Original, self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
    original(self, _WithSafeNames(dataloader), *args, **kwargs)


class _WithSafeNames:
    """A loader whose images have paths from which safe names for files follow."""

    def __init__(self, loader: Any) -> None:
        self.dataset, self._loader = loader.dataset, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from esc_arch.models.metrics import image_measured

        for data in self._loader:
            names = [image_name(path) for path in data["lq_path"]]
            image_measured.set(f"{', '.join(names)} of {self.dataset.opt['name']}")
            yield {**data, "lq_path": [f"{name}.png" for name in names]}


@patch(_SR_MODEL, "SRModel._log_validation_metric_values", "metrics.jsonl has validations, and a test no best one")
def log_validation_metric_values(
    original: Original, self: Any, current_iter: Any, dataset_name: str, tb_logger: Any
) -> None:
    if not self.opt["is_train"]:  # the best of one validation is itself
        vars(self).pop("best_metric_results", None)
    original(self, current_iter, dataset_name, tb_logger)
    if (run := current_run()) is not None and run.history is not None:
        bicubic = getattr(self, "bicubic", {}).get(dataset_name)
        record = {"iter": current_iter, "dataset": dataset_name, **({"bicubic": bicubic} if bicubic else {})}
        run.history.append(record | self.metric_results)


@patch("basicsr.metrics", "calculate_metric", "a metric that cannot be computed of an image is named with it")
def calculate_metric(original: Original, data: dict[str, Any], opt: dict[str, Any]) -> Any:
    from esc_arch.models.metrics import measure  # its package imports basicsr's models, which import this function

    return measure(original, data, opt)
