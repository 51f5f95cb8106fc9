"""Replacements in basicsr 1.4.2 that keep a training from losing its work, or from going on with nonsense."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from esc_arch.errors import UserError

from .patches import patch

__all__: list[str] = []

logger = logging.getLogger("basicsr")


def _save(content: Any, path: Path, last: bool) -> None:
    """Write a checkpoint whole or not at all (faults 8 and 9).

    A disk that is full for a while must not end a training of days: the failure is logged and the next checkpoint
    tries again. Only the last one, after which nothing follows, raises.
    """
    from esc_arch.data.safe_files import replacing, writing_to

    try:
        with writing_to(path.parent), replacing(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's writer reports a full disk so
                raise OSError(str(error).splitlines()[0]) from error
    except UserError as error:
        message = f"{path.name} was not saved, and the one before is untouched. {error}"
        if last:
            raise UserError(message) from error
        logger.error(message)


@patch("basicsr.models.base_model", "BaseModel.save_network", "checkpoints are written whole or not at all")
def _save_network(original: Callable[..., Any]) -> Callable[..., Any]:
    from basicsr.utils.dist_util import master_only

    @master_only
    @functools.wraps(original)
    def save_network(
        self: Any,
        net: nn.Module | Sequence[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | Sequence[str] = "params",
    ) -> None:
        nets = [net] if isinstance(net, nn.Module) else net
        keys = [param_key] if isinstance(param_key, str) else param_key
        content = {
            key: {name: tensor.cpu() for name, tensor in self.get_bare_model(each).state_dict().items()}
            for key, each in zip(keys, nets, strict=True)
        }
        label = "latest" if current_iter == -1 else current_iter
        _save(content, Path(self.opt["path"]["models"], f"{net_label}_{label}.pth"), last=current_iter == -1)

    return save_network


@patch("basicsr.models.base_model", "BaseModel.save_training_state", "states are written whole or not at all")
def _save_training_state(original: Callable[..., Any]) -> Callable[..., Any]:
    from basicsr.utils.dist_util import master_only

    @master_only
    @functools.wraps(original)
    def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
        if current_iter == -1:  # the end of training: there is nothing to go on with
            return
        content = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }
        _save(content, Path(self.opt["path"]["training_states"], f"{current_iter}.state"), last=False)

    return save_training_state


@patch("basicsr.models.base_model", "BaseModel.model_ema", "the averaged network has the buffers of the trained one")
def _model_ema(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @torch.no_grad()
    def model_ema(self: Any, decay: float = 0.999) -> None:
        original(self, decay)
        trained = dict(self.get_bare_model(self.net_g).named_buffers())
        for name, buffer in self.net_g_ema.named_buffers():
            buffer.copy_(trained[name])

    return model_ema


@patch("basicsr.data", "worker_init_fn", "workers draw other random crops in every epoch")
def _worker_init_fn(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def worker_init_fn(worker_id: int, num_workers: int, rank: int, seed: int) -> None:
        # torch gives every worker of every epoch a seed of its own, which follows from the run's seed and rank
        own = torch.initial_seed() % 2**32
        np.random.seed(own)
        random.seed(own)

    return worker_init_fn


class _Failure:
    """What the thread that loads data hands on when it fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@patch("basicsr.data.prefetch_dataloader", "PrefetchGenerator.run", "a failure while prefetching ends the wait for it")
def _prefetch_run(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(self: Any) -> None:
        try:
            original(self)
        except BaseException as error:  # whatever it is, the training waits for something
            self.queue.put(_Failure(error))

    return run


@patch("basicsr.data.prefetch_dataloader", "PrefetchGenerator.__next__", "a failure while prefetching is raised")
def _prefetch_next(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __next__(self: Any) -> Any:
        item = original(self)
        if isinstance(item, _Failure):
            raise item.error
        return item

    return __next__
