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

__all__ = ["save_atomically"]

logger = logging.getLogger("basicsr")


def save_atomically(content: Any, path: Path, last: bool) -> bool:
    """Write a checkpoint whole or not at all (faults 8 and 9); whether it was written.

    A disk that is full for a while must not end a training of days: the failure is logged and the next checkpoint
    tries again. Only the last one, after which nothing follows, raises.
    """
    from esc_arch.atomic_io import replacing, writing_to

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
        return False
    return True


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
            key: {name: tensor.cpu().contiguous() for name, tensor in self.get_bare_model(each).state_dict().items()}
            for key, each in zip(keys, nets, strict=True)
        }
        label = "latest" if current_iter == -1 else current_iter
        save_atomically(content, Path(self.opt["path"]["models"], f"{net_label}_{label}.pth"), last=current_iter == -1)

    return save_network


@patch("basicsr.models.base_model", "BaseModel.model_ema", "the averaged network has the buffers of the trained one")
def _model_ema(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @torch.no_grad()
    def model_ema(self: Any, decay: float = 0.999) -> None:
        trained = self.get_bare_model(self.net_g)
        # BasicSR's arithmetic in one call for all tensors, which on a GPU is one kernel for hundreds
        averaged = list(self.net_g_ema.parameters())
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, list(trained.parameters()), alpha=1 - decay)
        buffers = dict(trained.named_buffers())
        for name, buffer in self.net_g_ema.named_buffers():
            buffer.copy_(buffers[name])

    return model_ema


@patch("basicsr.data", "worker_init_fn", "workers draw other random crops in every epoch")
def _worker_init_fn(original: Callable[..., Any]) -> Callable[..., Any]:
    from esc_arch.training.stopping import shield_worker

    @functools.wraps(original)
    def worker_init_fn(worker_id: int, num_workers: int, rank: int, seed: int) -> None:
        shield_worker()
        # torch gives every worker of every epoch a seed of its own, which follows from the run's seed and rank
        own = torch.initial_seed() % 2**32
        np.random.seed(own)
        random.seed(own)

    return worker_init_fn
