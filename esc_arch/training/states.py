"""What a training state holds beyond BasicSR's, so that a resumed run is as if it had not stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esc_arch.errors import UserError
from esc_arch.training.distributed import gather_objects

from .parameter_order import in_order_of, named_state
from .random_state import capture, restore
from .run import current_run
from .schedulers import SCHEDULERS

__all__ = ["apply_state", "prune", "training_state"]

#: Of schedulers: what the option file says, not what the iterations change.
_SCHEDULE = ("milestones", "gamma", "restarts", "restart_weights", "periods", "eta_min", "T_max", "step_size", "power")


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
        "random": gather_objects(capture()),  # of each process
        "best_metric_results": _plain_numbers(getattr(model, "best_metric_results", None)),
        "model": model.extra_state() if hasattr(model, "extra_state") else {},
    }


def _plain_numbers(results: Any) -> Any:
    """BasicSR's table of best results without NumPy's numbers, which are not loaded without unpickling."""
    if isinstance(results, Mapping):
        return {key: _plain_numbers(value) for key, value in results.items()}
    return results.item() if isinstance(results, np.generic) else results


def apply_state(model: Any, state: Mapping[str, Any], load: Any) -> None:
    """Go on from `state`; `load` is BasicSR's part of it. States that BasicSR wrote have no more than that.

    Raises:
        UserError: the state is of other optimisers, parameters or schedules.
    """
    try:
        # States of BasicSR have no random numbers
        optimizers = in_order_of(model, state["optimizers"], earlier="random" in state)
        state = {**state, "optimizers": optimizers}
        _refuse_other_schedules(model, state)
        for warning in _ignored_changes(model, state):
            logging.getLogger("basicsr").warning(warning)
        load(model, state)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.opt['path'].get('resume_state')} does not fit the optimisers of the option file ({error}). Give "
            f"train: optim_*, scheduler, freeze and lr_factors as in the run that saved it, or start a new run from "
            f"its network with path: pretrain_network_g."
        ) from error
    try:
        _apply_rest(model, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.opt['path'].get('resume_state')} is damaged, or of another program ({type(error).__name__}: "
            f"{error}). Remove it, and go on from an earlier state with --auto_resume."
        ) from error


def _refuse_other_schedules(model: Any, state: Mapping[str, Any]) -> None:
    """A schedule of one type that goes on with the numbers of another follows neither, or fails in its first step.

    Raises:
        ValueError: what a state keeps is not what the schedule has.
    """
    for scheduler, saved in zip(model.schedulers, state["schedulers"], strict=False):
        if (name := type(scheduler).__name__) not in SCHEDULERS:
            continue  # of another package, whose numbers may come and go with its versions
        # Versions of PyTorch differ in what is private, and early ones have `verbose`
        now, before = (
            {key for key in entries if not key.startswith("_") and key != "verbose"}
            for entries in (scheduler.state_dict(), saved)
        )
        if now != before:
            kept = ", ".join(sorted(before - now)) or "nothing"
            raise ValueError(
                f"train: scheduler: type is {name}, and the state was saved by another, which has {kept} besides"
            )


def _apply_rest(model: Any, state: Mapping[str, Any]) -> None:
    """What BasicSR's states do not have."""
    if state.get("best_metric_results"):
        model.best_metric_results = state["best_metric_results"]
    if state.get("model") and hasattr(model, "load_extra_state"):
        model.load_extra_state(state["model"])
    run = current_run()
    if run is not None and state.get("samples") is not None:
        run.resume(state["epoch"], state["samples"])
    random, rank = state.get("random") or [], model.opt["rank"]
    if rank < len(random):
        restore(random[rank])


def _ignored_changes(model: Any, state: Mapping[str, Any]) -> Iterator[str]:
    """What the option file says otherwise than the state, which is what counts (fault 28)."""
    advice = "To change it, start a new run from the network with path: pretrain_network_g"
    for optimizer, saved in zip(model.optimizers, state["optimizers"], strict=False):
        asked = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
        going_on = {group.get("initial_lr", group["lr"]) for group in saved["param_groups"]}
        if asked != going_on:
            yield (
                f"The learning rate of the option file ({_listed(asked)}) is ignored: a resumed run goes on with "
                f"{_listed(going_on)}. {advice}."
            )
    for scheduler, saved in zip(model.schedulers, state["schedulers"], strict=False):
        for key in _SCHEDULE:
            now, before = getattr(scheduler, key, None), saved.get(key)
            if key in saved and _plain(now) != _plain(before):
                yield (
                    f"train:scheduler:{key} of the option file ({_plain(now)}) is ignored: a resumed run goes on with "
                    f"{_plain(before)}. {advice}."
                )


def _listed(numbers: set[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))


def _plain(value: Any) -> Any:
    """Tuples, lists and BasicSR's counter of milestones as one kind of thing."""
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
    numbers = {int(path.stem) for path in states.glob("*.state") if path.stem.isdigit()}
    newest = sorted(numbers)[-keep:]
    if not newest:
        return
    results = getattr(model, "best_metric_results", None) or {}
    best = {record["iter"] for of_set in results.values() for record in of_set.values()}
    old = [path for path in states.glob("*.state") if path.stem.isdigit() and int(path.stem) < newest[0]]
    for path in models.glob("net_*_*.pth"):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) < newest[0] and int(number) not in best:
            old.append(path)
    try:
        for path in old:
            path.unlink(missing_ok=True)
    except OSError as error:  # no reason to end a training
        logging.getLogger("basicsr").warning("%s cannot be removed: %s.", error.filename, error.strerror)
