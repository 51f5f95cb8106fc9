"""What is seen of a training while it runs: BasicSR's log lines with more in them, a progress bar, wandb."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import MessageLogger, get_root_logger
from basicsr.utils.dist_util import get_dist_info, master_only
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from esc_arch import system
from esc_arch.errors import UserError

from .history import History

__all__ = ["TrainingLog", "images_per_iteration", "init_wandb", "losses_of", "peak_memory"]

#: BasicSR's own class also where its name already stands for this module's.
_BasicsrLog: Any = getattr(MessageLogger, "_esc_arch_original", MessageLogger)


class TrainingLog(_BasicsrLog):
    """BasicSR's log of a training, and a progress bar where there is a terminal.

    Each line ends with images per second and peak memory: `[images/s: 81.3, memory: 2.41 GiB]`. TensorBoard gets `lr`
    (`lr/0`, `lr/1`, ... when groups of parameters differ) and `images_per_s` as well, and `history`, where it is set,
    all of it. When stderr is a terminal, `step` shows a bar there. These lines then go to the log file alone,
    and other lines of the log appear above the bar.
    """

    def __init__(self, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
        super().__init__(opt, start_iter, tb_logger)
        self.max_iters = int(opt["train"]["total_iter"]) + 1  # BasicSR's time left is of one iteration less
        self.history: History | None = None
        self._lines = _IterationLines(get_root_logger())
        self.logger = self._lines
        self._images = images_per_iteration(opt)
        self._on_gpu = opt["num_gpu"] != 0 and torch.cuda.is_available()
        self._has_bar = get_dist_info()[0] == 0 and sys.stderr.isatty()
        self._bar: _Progress | None = None
        self._redirection = ExitStack()

    @master_only
    def __call__(self, log_vars: dict[str, Any]) -> None:
        """Log an iteration: `epoch`, `iter`, `lrs`, `time` and `data_time` (seconds per iteration), and losses."""
        rest = dict(log_vars)
        rates = rest.pop("lrs")
        record = {"iter": rest.pop("iter"), "epoch": rest.pop("epoch"), "lr": rates[0]}
        scalars = {"lr": rates[0]}
        if len(set(rates)) > 1:
            record["lrs"] = list(rates)
            scalars = {f"lr/{index}": rate for index, rate in enumerate(rates)}
        memory = peak_memory(self._on_gpu) / 2**30
        costs = f"memory: {memory:.2f} GiB"
        if rest.get("time"):
            speed = record["images_per_s"] = scalars["images_per_s"] = self._images / rest["time"]
            costs = f"images/s: {speed:.1f}, {costs}"
        record |= {"memory_gib": round(memory, 3)} | rest
        self._lines.suffix = f"[{costs}] "
        super().__call__(dict(log_vars))
        if self.use_tb_logger and "debug" not in self.exp_name:
            for tag, value in scalars.items():
                self.tb_logger.add_scalar(tag, value, record["iter"])
        if self.history is not None:
            self.history.append(record)
        if self._bar is not None:
            losses = list(losses_of(record).items())[:3]
            shown = [f"{name if len(losses) > 1 else 'loss'} {value:.3e}" for name, value in losses]
            self._bar.set_postfix_str(", ".join([*shown, f"lr {rates[0]:.2e}", costs]))

    def step(self, iteration: int) -> None:
        """Move the bar, if there is one, to `iteration` finished iterations. Cheap, and never waits for a GPU."""
        if not self._has_bar:
            return
        if self._bar is None:
            self._bar = _Progress(
                total=self.max_iters - 1,
                initial=iteration,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.5,
                miniters=1,  # the clock is read each time: a slow phase would be shown late otherwise
                smoothing=0,  # the time left counts validations in, which come at intervals
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
            self._redirection.enter_context(logging_redirect_tqdm([self._lines.logger], _Progress))
            self._lines.logger.handlers[-1].addFilter(lambda line: not hasattr(line, "is_iteration"))
        self._bar.update(iteration - self._bar.n)

    def close(self) -> None:
        """Remove the bar and restore the log; to be called however the training ends."""
        self._has_bar = False
        self._redirection.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Progress(tqdm):
    # tqdm's thread, which redraws bars that stand still, and forked workers do not go together
    monitor_interval = 0


class _IterationLines(logging.LoggerAdapter):
    """BasicSR's logger for the lines of iterations: adds a suffix, and a mark by which the terminal leaves them out."""

    suffix = ""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"{msg}{self.suffix}", {**kwargs, "extra": {"is_iteration": True}}


def images_per_iteration(opt: Mapping[str, Any]) -> int:
    """How many images all processes together take in one iteration, as BasicSR builds its data loader."""
    replicas = opt["world_size"] if opt["dist"] else max(opt["num_gpu"], 1)
    return int(opt["datasets"]["train"]["batch_size_per_gpu"] * replicas)


def peak_memory(on_gpu: bool) -> int:
    """The most memory that this process has had so far, in bytes: of its GPU, or its resident set."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return system.peak_memory()


def losses_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The losses in a record of an iteration: BasicSR's names for them begin with l_."""
    return {name: value for name, value in record.items() if name.startswith("l_")}


@master_only
def init_wandb(opt: dict[str, Any]) -> None:
    """Have wandb follow TensorBoard, as BasicSR's init_wandb_logger does with old releases of wandb.

    A resumed run goes on in its wandb run, whose id is kept in its folder (`wandb_id.txt`), unless
    `logger: wandb: resume_id` names another. UserError if wandb does not start: not logged in, or no network.
    """
    import wandb

    options = opt["logger"]["wandb"]
    kept = Path(opt["path"]["experiments_root"], "wandb_id.txt")
    run_id = options.get("resume_id") or (kept.read_text(encoding="utf-8").strip() if kept.is_file() else "")
    run_id = str(run_id or secrets.token_hex(4))  # not from a generator that the run's seed determines
    try:
        wandb.init(
            id=run_id, resume="allow", name=opt["name"], config=opt, project=options["project"], sync_tensorboard=True
        )
    except wandb.Error as error:
        raise UserError(
            f"wandb did not start: {error} Log in with `wandb login`, set WANDB_MODE=offline to log to this machine, "
            f"or set logger: wandb: project: ~ to go without."
        ) from error
    kept.write_text(f"{run_id}\n", encoding="utf-8")
    logging.getLogger("basicsr").info("wandb: project %s, run %s.", options["project"], run_id)
