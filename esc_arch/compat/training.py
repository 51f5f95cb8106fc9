"""Patches for `basicsr.train` and `basicsr.test`: how runs start, resume, go on and end."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from basicsr.utils import check_resume
from basicsr.utils.dist_util import master_only
from torch import Tensor

from esc_arch.atomic_io import read_regular, remove_partial, write_atomically
from esc_arch.checkpoints.reading import find_weights, read_checkpoint, require_usable
from esc_arch.errors import UserError
from esc_arch.printing import shown
from esc_arch.training.data_order import EpochSampler
from esc_arch.training.run import current_run, saved_states, training_run
from esc_arch.training.run_locks import lock_run, run_locks

from .failures import system_faults_named
from .patches import PATCHES, Original, patch
from .prefetch import stop_prefetching

logger = logging.getLogger("basicsr")

PATCHES.append(
    ("basicsr.data.data_sampler", "EnlargedSampler", lambda _: EpochSampler, "an epoch can be begun in the middle")
)


@patch("basicsr.train", "train_pipeline", "a training stops when asked to, all saved, and ends with a report")
def train_pipeline(original: Original, root_path: str) -> None:
    with run_locks(), training_run() as run, system_faults_named():
        try:
            original(root_path)
            run.finish()
        finally:
            stop_prefetching()


@patch("basicsr.test", "test_pipeline", "a test ends with where results are; a full disk is one message")
def test_pipeline(original: Original, root_path: str) -> None:
    with run_locks() as folders, system_faults_named():
        original(root_path)
        for folder in [*folders][-1:]:  # on rank 0
            pictures = folder / "visualization"
            logger.info("Results are in %s", pictures if any(pictures.glob("*")) else folder)


@patch("basicsr.utils.misc", "make_exp_dirs", "no two runs of one name write into one folder")
def make_exp_dirs(original: Original, opt: dict[str, Any]) -> None:
    lock_run(opt)
    original(opt)


@patch("basicsr.train", "copy_opt_file", "option files are UTF-8 whatever the locale")
@master_only
def copy_opt_file(_: Original, opt_file: str, experiments_root: str) -> None:
    text = read_regular(opt_file, pipes=True).decode()
    header = f"# GENERATE TIME: {time.asctime()}\n# CMD:\n# {shown(' '.join(sys.argv))}\n\n"
    write_atomically(Path(experiments_root, os.path.basename(opt_file)), (header + text).encode())


@patch("basicsr.train", "create_train_val_dataloader", "a run does total_iter iterations, or is refused")
def create_train_val_dataloader(original: Original, opt: dict[str, Any], logger: Any) -> Any:
    train_loader, train_sampler, val_loaders, epochs, iterations = original(opt, logger)
    if len(train_loader) == 0:
        raise UserError(
            f"datasets: train ({opt['datasets']['train'].get('name')}) has {len(train_loader.dataset)} images, fewer "
            f"than one batch of {train_loader.batch_size}, so that no iteration would be done. Lower "
            f"batch_size_per_gpu, raise dataset_enlarge_ratio, or add images."
        )
    for loader in val_loaders:
        if len(loader.dataset) == 0:
            raise UserError(f"The validation set {loader.dataset.opt['name']} has no images: check its dataroot_lq.")
    if (run := current_run()) is not None:
        run.has_data(opt, train_loader, val_loaders)
    images = f"{len(train_loader.dataset)} images in batches of {train_loader.batch_size * opt['world_size']}"
    sets = [f"{loader.dataset.opt['name']} ({len(loader.dataset)})" for loader in val_loaders if opt.get("val")]
    logger.info("Data: %s; validation on %s", images, ", ".join(sets) or "nothing")
    # BasicSR counts the last, incomplete batch of an epoch, which is left out, and would stop too early
    epochs = max(epochs, math.ceil(iterations / len(train_loader)))
    return train_loader, train_sampler, val_loaders, epochs, iterations


@patch("basicsr.models", "build_model", "the training's hooks know the model")
def build_model(original: Original, opt: dict[str, Any]) -> Any:
    model = original(opt)
    if (run := current_run()) is not None:
        run.model = model
    return model


@patch("basicsr.train", "load_resume_state", "resuming needs no GPU, and looks where this run writes")
def load_resume_state(_: Original, opt: dict[str, Any]) -> dict[str, Any] | None:
    if opt["auto_resume"]:
        lock_run(opt)  # before: a run that goes on would write newer ones
        if (found := _newest_state(opt)) is None:
            return None
        path, state = found
        opt["path"]["resume_state"] = str(path)
    elif opt["path"].get("resume_state"):
        state = _read_state(Path(opt["path"]["resume_state"]))
    else:
        return None
    root = opt["path"]["experiments_root"]
    if not os.path.isdir(root):
        raise UserError(
            f"{opt['path']['resume_state']} cannot be resumed under the name {opt['name']}: there is no folder "
            f"{root}, from which its networks would be read. Give name and path: experiments_root of the run "
            f"that saved it."
        )
    lock_run(opt)
    check_resume(opt, state["iter"])
    if opt["rank"] == 0:
        for folder in ("models", "training_states"):
            remove_partial(Path(opt["path"][folder]))
    if state.get("manual_seed") is not None:
        opt["manual_seed"] = state["manual_seed"]  # the order of the data follows from it
    return state


def _newest_state(opt: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest training state of a run that can be used, with its content; None if the run saved none."""
    folder = Path(opt["path"]["training_states"])
    problems = []
    for path in reversed(saved_states(folder)):
        try:
            state = _read_state(path)
            _require_networks(opt, path, state["iter"])
            return path, state
        except UserError as error:
            problems.append(str(error))
            print(f"--auto_resume skips a state: {error}", file=sys.stderr, flush=True)
    if problems:  # going on would archive the very run that was to be continued
        raise UserError(f"--auto_resume found no usable state in {folder}: {' '.join(problems)} Nothing was changed.")
    return None


def _require_networks(opt: dict[str, Any], state: Path, iteration: int) -> None:
    """Refuse a state whose networks are missing, as after a full disk, or cannot be used."""
    for network in (key.removeprefix("network_") for key in opt if key.startswith("network_") and opt[key]):
        if f"network_{network}" in (opt["path"].get("ignore_resume_networks") or ()):
            continue
        path = Path(opt["path"]["models"], f"net_{network}_{iteration}.pth")
        if not path.is_file():
            raise UserError(f"{state} belongs to {path}, which is not there.")
        content = read_checkpoint(path)
        for key in ("params", "params_ema"):
            find_weights(content, key, path)


def _read_state(path: Path) -> dict[str, Any]:
    state = read_checkpoint(path)
    for key in ("epoch", "iter", "optimizers", "schedulers"):
        value: Any = state.get(key)
        if key in ("epoch", "iter"):  # of which names of files are made
            is_right = type(value) is int and value >= 0
        else:
            is_right = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        if not is_right:
            raise UserError(f"{path} is not a training state: its {key} is {value!s:.80}.")
    for number, optimizer in enumerate(state["optimizers"]):
        entries = optimizer.get("state")
        for parameter, entry in entries.items() if isinstance(entries, dict) else ():
            values = entry.items() if isinstance(entry, dict) else ()
            tensors = {f"{key} of parameter {parameter}": value for key, value in values if isinstance(value, Tensor)}
            require_usable(tensors, f"optimizer {number} of {path}")
    return state
