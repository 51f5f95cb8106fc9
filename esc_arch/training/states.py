"""What a training state holds beyond BasicSR's, so that a resumed run is as if it had not stopped."""

from __future__ import annotations

import inspect
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esc_arch.errors import UserError
from esc_arch.training.distributed import gather_objects

from .parameter_order import in_order_of, named_state
from .run import current_run, saved_states
from .schedulers import SCHEDULERS

__all__ = ["apply_state", "prune", "training_state"]

logger = logging.getLogger("basicsr")

#: What loading a state that does not fit, or is damaged, may raise.
_MISFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def training_state(model: Any, epoch: int, iteration: int) -> dict[str, Any]:
    """Everything to go on from after `iteration`. To be called by all processes; that of the first is to be saved.

    The networks are saved by themselves, as BasicSR does.
    """
    run = current_run()
    return {
        "epoch": epoch,
        "iter": iteration,
        "optimizers": [named_state(model, optimizer) for optimizer in model.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in model.schedulers],
        "manual_seed": model.opt.get("manual_seed"),
        "samples": run.samples if run else None,  # of the epoch, over all processes
        "random": gather_objects(_random_state()),  # of each process
        # Without NumPy's numbers, which are not loaded without unpickling
        "best_metric_results": json.loads(
            json.dumps(getattr(model, "best_metric_results", None), default=np.generic.item)
        ),
        "model": model.extra_state() if hasattr(model, "extra_state") else {},
    }


def _random_state() -> dict[str, Any]:
    """The state of all generators, in plain numbers, which processes can exchange and safe loading takes."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": [each.tolist() for each in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `_random_state` returned; GPUs that are not here are left out."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    of_numpy = state["numpy"]
    inner = {"key": np.array(of_numpy["state"]["key"], np.uint32), "pos": of_numpy["state"]["pos"]}
    np.random.set_state(of_numpy | {"state": inner})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(of_device, dtype=torch.uint8), device)


def apply_state(model: Any, state: Mapping[str, Any], load: Callable[[Any, Any], None]) -> None:
    """Go on from `state`; `load` is BasicSR's part of it. States that BasicSR wrote have no more than that.

    UserError if the state is of other optimisers, parameters or schedules, or is damaged.
    """
    file = model.opt["path"].get("resume_state")
    try:
        # States of BasicSR have no random numbers
        state = {**state, "optimizers": in_order_of(model, state["optimizers"], earlier="random" in state)}
        for warning in list(_ignored_changes(model, state)):
            logger.warning(warning)
        load(model, state)
    except _MISFIT as error:
        raise UserError(
            f"{file} does not fit the optimisers of the option file ({error}). Give train: optim_*, scheduler, freeze "
            f"and lr_factors as in the run that saved it, or start a new run from its network with path: "
            f"pretrain_network_g."
        ) from error
    try:
        if state.get("best_metric_results"):
            model.best_metric_results = state["best_metric_results"]
        if state.get("model") and hasattr(model, "load_extra_state"):
            model.load_extra_state(state["model"])
        run = current_run()
        if run is not None and state.get("samples") is not None:
            run.sampler.resume(state["epoch"], state["samples"])
        states, rank = state.get("random") or [], model.opt["rank"]
        if rank < len(states):
            _restore_random_state(states[rank])
    except _MISFIT as error:
        raise UserError(
            f"{file} is damaged, or of another program ({type(error).__name__}: {error}). Remove it, and go on from an "
            f"earlier state with --auto_resume."
        ) from error


def _ignored_changes(model: Any, state: Mapping[str, Any]) -> Iterator[str]:
    """Differences of the option file from the state, which is what counts (fault 28).

    ValueError for the numbers of another schedule: going on with them follows neither, or fails at once.
    """
    changes: list[tuple[str, Any, Any]] = []
    for optimizer, saved in zip(model.optimizers, state["optimizers"], strict=False):
        rate, before = (
            ", ".join(f"{rate:g}" for rate in sorted({group.get("initial_lr", group["lr"]) for group in groups}))
            for groups in (optimizer.param_groups, saved["param_groups"])
        )
        changes.append(("The learning rate", rate, before))
    for scheduler, saved in zip(model.schedulers, state["schedulers"], strict=False):
        now, kind = scheduler.state_dict(), type(scheduler)
        # Versions of PyTorch differ in what is private, and early ones have `verbose`
        keys, kept = ({key for key in of if key[0] != "_" and key != "verbose"} for of in (now, saved))
        if keys != kept and kind.__name__ in SCHEDULERS:  # those of other packages may change with their versions
            others = ", ".join(sorted(kept - keys)) or "nothing"
            raise ValueError(
                f"train: scheduler: type is {kind.__name__}, and the state was saved by another, which has {others} "
                f"besides"
            )
        for key in inspect.signature(kind).parameters:
            if key in keys & kept and key != "last_epoch":
                changes.append((f"train:scheduler:{key}", _plain(now[key]), _plain(saved[key])))
    for what, now, before in changes:
        if now != before:
            yield (
                f"{what} of the option file ({now}) is ignored: a resumed run goes on with {before}. To change it, "
                f"start a new run from the network with path: pretrain_network_g."
            )


def _plain(value: Any) -> Any:
    """Tuples, lists and BasicSR's counter of milestones as lists."""
    if isinstance(value, Mapping):
        return sorted(value)
    return list(value) if isinstance(value, list | tuple) else value


def prune(model: Any) -> None:
    """Remove old checkpoints and states, as ``logger: keep_last: N`` says; networks of the best iterations stay.

    Only after a save that succeeded, so that there are N that load.
    """
    keep = model.opt["logger"].get("keep_last")
    if not keep:
        return
    models, states = (Path(model.opt["path"][key]) for key in ("models", "training_states"))
    numbered = {path: int(path.stem) for path in saved_states(states)}
    oldest_kept = min(sorted(numbered.values())[-keep:], default=0)
    results = getattr(model, "best_metric_results", None) or {}
    best = {record["iter"] for of_set in results.values() for record in of_set.values()}
    for path in models.glob("net_*_*.pth"):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) not in best:
            numbered[path] = int(number)
    try:
        for path, iteration in numbered.items():
            if iteration < oldest_kept:
                path.unlink(missing_ok=True)
    except OSError as error:  # no reason to end a training
        logger.warning("%s cannot be removed: %s.", error.filename, error.strerror)
