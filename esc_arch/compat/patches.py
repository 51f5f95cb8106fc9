"""Replacements for functions of basicsr 1.4.2 that fail.

Each is put wherever basicsr's own modules hold the original, because most of them import functions by name. A
replacement that only adds a check or a message calls the original. What a run that works computes stays the same, but
for two faults: a run ended before `total_iter`, and its workers drew the same random crops in every epoch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esc_arch.errors import UserError
from esc_arch.version import __version__

__all__ = ["PATCHES", "SUPPORTED_VERSION", "apply_patches", "patch", "reason_against_patches"]

SUPPORTED_VERSION = "1.4.2"

logger = logging.getLogger("esc_arch")

#: (module, dotted name in it, maker of the replacement from the original, what it fixes)
PATCHES: list[tuple[str, str, Callable[[Any], Any], str]] = []


def patch(module: str, name: str, fixes: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a patch factory: the decorated function gets the original and returns its replacement."""

    def note(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PATCHES.append((module, name, make, fixes))
        return make

    return note


def apply_patches() -> None:
    """Put every replacement in place, once; does nothing for a basicsr that they are not made for, and says so."""
    if reason := reason_against_patches():
        folder = Path(str(sys.modules["basicsr"].__file__)).parent
        logger.warning(
            "esc_arch fixes faults of basicsr %s; %s is left as it is: %s.", SUPPORTED_VERSION, folder, reason
        )
        return
    for module_name, name, make, fixes in PATCHES:
        *parents, attribute = name.split(".")
        owner = _owner(module_name, parents)
        current = getattr(owner, attribute)
        original = getattr(current, "_esc_arch_original", current)  # after a re-import: never patch a patch
        replacement = make(original)
        replacement._esc_arch_original = original
        setattr(owner, attribute, replacement)
        if not parents:
            _replace_imported_names(attribute, current, replacement)
        logger.debug("basicsr: %s.%s replaced: %s", module_name, name, fixes)


def reason_against_patches() -> str:
    """Why the basicsr that is imported is not replaced in; empty when it is."""
    version = getattr(sys.modules["basicsr"], "__version__", "unknown")
    if version != SUPPORTED_VERSION:
        return f"this is {version}"
    for module, name, *_ in PATCHES:  # distributions of other names have the version, and may have other contents
        *parents, attribute = name.split(".")
        try:
            getattr(_owner(module, parents), attribute)
        except (ImportError, AttributeError):
            return f"it has no {module}.{name}"
    return ""


def _owner(module: str, parents: list[str]) -> Any:
    return functools.reduce(getattr, parents, importlib.import_module(module))


def _replace_imported_names(name: str, current: object, replacement: object) -> None:
    """`from basicsr.utils import f` in basicsr's modules made more names for the same function."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "basicsr" and getattr(module, name, None) is current:
            setattr(module, name, replacement)


@patch("basicsr.utils.logger", "get_env_info", "a run's log lists these replacements and what was said before it")
def _get_env_info(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_env_info() -> str:
        from esc_arch.training.distributed import take_notes

        listed = "".join(f"\n\t{module}.{name}: {fixes}" for module, name, _, fixes in PATCHES)
        notes = take_notes()
        log = logging.getLogger("basicsr")
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler):  # the terminal has had them
                for note in notes:
                    handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, "Note: %s", (note,), None))
        return f"{original()}\nesc_arch {__version__} replaces in basicsr {SUPPORTED_VERSION}:{listed}"

    return get_env_info


# --- resuming -----------------------------------------------------------------------------------------------------


@patch("basicsr.train", "load_resume_state", "resuming needs no GPU, and looks where this run writes")
def _load_resume_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
        from basicsr.utils import check_resume

        from esc_arch.atomic_io import remove_partial

        if opt["auto_resume"]:
            found = _newest_state(opt)
            if found is None:
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
        check_resume(opt, state["iter"])
        if opt["rank"] == 0:
            for folder in ("models", "training_states"):
                remove_partial(Path(opt["path"][folder]))
        if state.get("manual_seed") is not None:
            opt["manual_seed"] = state["manual_seed"]  # the order of the data follows from it
        return state

    return load_resume_state


def _newest_state(opt: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest training state of a run that can be used, with its content; None when the run saved none."""
    folder = Path(opt["path"]["training_states"])
    paths = [path for path in folder.glob("*.state") if path.stem.isdigit()] if folder.is_dir() else []
    problems = []
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
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
    """Whether the networks that were saved with a state are there: one may have met a full disk."""
    for network in (key.removeprefix("network_") for key in opt if key.startswith("network_") and opt[key]):
        path = Path(opt["path"]["models"], f"net_{network}_{iteration}.pth")
        if f"network_{network}" not in (opt["path"].get("ignore_resume_networks") or ()) and not path.is_file():
            raise UserError(f"{state} belongs to {path}, which is not there.")


def _read_state(path: Path) -> dict[str, Any]:
    from esc_arch.checkpoints import read_checkpoint

    state = read_checkpoint(path)
    if missing := {"epoch", "iter", "optimizers", "schedulers"} - state.keys():
        raise UserError(f"{path} is not a training state: it has no {', '.join(sorted(missing))}.")
    for key in ("epoch", "iter"):  # of which names of files are made
        if type(state[key]) is not int or state[key] < 0:
            raise UserError(f"{path} is not a training state: its {key} is {state[key]!s:.80}.")
    for key in ("optimizers", "schedulers"):
        if not isinstance(state[key], list) or not all(isinstance(entry, dict) for entry in state[key]):
            raise UserError(f"{path} is not a training state: its {key} is {state[key]!s:.80}.")
    return state


# --- models ---------------------------------------------------------------------------------------------------------


@patch("basicsr.models.base_model", "BaseModel.__init__", "programs may build models from options of their own")
def _base_model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, opt: dict[str, Any]) -> None:
        from basicsr.utils.dist_util import get_dist_info

        rank, world_size = get_dist_info()
        # What the command line puts there, and replacements here read; BasicSR's own models do without most of it
        for key, value in {"rank": rank, "world_size": world_size, "dist": world_size > 1, "logger": {}}.items():
            opt.setdefault(key, value)
        original(self, opt)

    return __init__


@patch("basicsr.models.base_model", "BaseModel.get_optimizer", "every optimiser of torch.optim, AdamW among them")
def _get_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_optimizer(self: Any, optim_type: str, params: Any, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        from esc_arch.training.optimizers import build_optimizer

        nets = [entry for entry in vars(self).values() if isinstance(entry, torch.nn.Module)]
        return build_optimizer(optim_type, params, nets=nets, lr=lr, **kwargs)

    return get_optimizer


@patch("basicsr.models.base_model", "BaseModel.setup_schedulers", "schedules of torch.optim.lr_scheduler")
def _setup_schedulers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup_schedulers(self: Any) -> None:
        from esc_arch.training.schedulers import BASICSR_SCHEDULERS, build_scheduler

        options = dict(self.opt["train"]["scheduler"])
        kind = options.pop("type")
        if kind in BASICSR_SCHEDULERS:
            original(self)
        else:
            self.schedulers += [build_scheduler(kind, optimizer, **options) for optimizer in self.optimizers]

    return setup_schedulers


@patch("basicsr.models.base_model", "BaseModel.get_bare_model", "a network wrapped by torch.compile can be saved")
def _get_bare_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_bare_model(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        while True:  # either wrapper may be the outer one
            inner = original(self, net)
            inner = getattr(inner, "_orig_mod", inner)
            if inner is net:
                return net
            net = inner

    return get_bare_model


@patch("basicsr.models.base_model", "BaseModel.model_to_device", "distributed training on CPUs")
def _model_to_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt["dist"] or self.device.type != "cpu":
            return original(self, net)
        from torch.nn.parallel import DistributedDataParallel

        find_unused = self.opt.get("find_unused_parameters", False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)

    return model_to_device


@patch("basicsr.models.base_model", "BaseModel.load_network", "checkpoints of every kind, and what does not fit")
def _load_network(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_network(
        self: Any, net: torch.nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights

        net = self.get_bare_model(net)
        weights = select_weights(read_checkpoint(load_path), param_key, load_path)
        load_weights(net, weights, strict=strict, source=load_path)
        logging.getLogger("basicsr").info("Loaded %s from %s.", type(net).__name__, load_path)

    return load_network
