"""The training that is going on in this process: what BasicSR's loop lacks, such as stopping when asked, and a report.

It hangs on what the loop calls: the prefetcher's `next`, the model, the log; see `compat.training`, `compat.prefetch`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esc_arch.errors import UserError
from esc_arch.training.distributed import Agreement, gather_objects

from .history import History
from .progress import TrainingLog
from .report import write_report
from .stopping import Stopped, StopRequest

__all__ = ["TrainingRun", "current_run", "saved_states", "training_run", "what_is_saved"]

logger = logging.getLogger("basicsr")

_current: TrainingRun | None = None


def current_run() -> TrainingRun | None:
    """The training that this process is in, if it is in one."""
    return _current


@contextmanager
def training_run() -> Iterator[TrainingRun]:
    """While this lasts, `current_run` is a new run, and signals ask it to stop."""
    global _current
    run = _current = TrainingRun()
    try:
        with run.stop.listening():
            yield run
    finally:
        _current = None
        run.close()


class TrainingRun:
    """One training, from its data to its report.

    Attributes:
        stop: true once it is asked to stop, with the signal.
        history: its numbers; None on all processes but the first.
        model, sampler: set once the loop has made them; the sampler is an `EpochSampler`.
        saved_iteration: of the last state that was saved.
        batches_of_epoch: how many were taken in the current epoch since it began or was resumed.
    """

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.history: History | None = None
        self.model: Any = None
        self.sampler: Any = None
        self.saved_iteration = -1
        self.batches_of_epoch = 0
        self._agreement = Agreement()
        self._started = time.monotonic()
        self._opt: dict[str, Any] = {}
        self._val_loaders: list[Any] = []
        self._log: Any = None  # a TrainingLog
        self._start_iteration = self._batches = self._batch_size = 0
        self._validated: set[tuple[str, int]] = set()

    # What the loop makes before it begins, in this order

    def has_data(self, opt: dict[str, Any], loader: Any, val_loaders: list[Any]) -> None:
        """The data are ready. From now on drawing from them leaves the process's own random numbers alone."""
        self._opt, self._val_loaders = opt, val_loaders
        self.sampler, self._batch_size = loader.sampler, loader.batch_size
        self.sampler.seed = opt["manual_seed"]
        for each in (loader, *val_loaders):
            each.generator = torch.Generator()

    def begins(self, log: TrainingLog, iteration: int) -> None:
        """The loop is about to begin after `iteration`, and will log to `log`."""
        self._start_iteration = iteration
        self._log = log
        if self._opt["rank"] == 0:
            self.history = log.history = History(Path(self._opt["path"]["experiments_root"], "metrics.jsonl"))
            self.history.truncate(iteration)
        if self.is_over:
            total = int(self._opt["train"]["total_iter"])
            message = "This training is finished: its last state is of iteration %d, and train: total_iter is %d. %s"
            logger.info(message, iteration, total, "To go on, raise total_iter.")

    # What the prefetcher calls

    def before_batch(self) -> bool:
        """An iteration, if there was one, is over; True if another is to follow.

        Raises `Stopped`, after everything is saved, if the training was asked to stop.
        """
        if self._batches == 0 and self._start_iteration and self._opt.get("val") is not None:
            self._catch_up()
        self._log.step(self.iteration)
        if self._agreement.any_rank(bool(self.stop)):
            saved = "saved" if self._save() else "nothing new to save"
            logger.info("Stopped on request after iteration %d; %s. Go on with --auto_resume.", self.iteration, saved)
            raise Stopped(self.stop.signum or 15)
        if self.is_over:
            # Where no checkpoint falls to the end: by its state --auto_resume knows that nothing is left to do
            self._save()
        return not self.is_over

    def has_batch(self) -> None:
        self._batches += 1
        self.batches_of_epoch += 1

    @property
    def is_over(self) -> bool:
        """True if all iterations are done; BasicSR's loop goes through its last epochs all the same."""
        return self.iteration >= int(self._opt["train"]["total_iter"])

    @property
    def iteration(self) -> int:
        """How many iterations are finished; while one is going on, its number."""
        return self._start_iteration + self._batches

    @property
    def samples(self) -> int:
        """How many samples of the current epoch are used, counted over all processes."""
        of_process = self.sampler.start + self.batches_of_epoch * self._batch_size
        return int(of_process) * int(self.sampler.num_replicas)

    def begins_validation(self, loader: Any, iteration: int) -> bool:
        """True if a set was not validated at this iteration yet: BasicSR's loop does so once more at its end."""
        validation = (_name_of(loader), iteration)
        is_first = validation not in self._validated
        self._validated.add(validation)
        return is_first

    def rescue(self) -> str:
        """Save what was trained since the last state, as the run is about to fail between two iterations.

        Returns a sentence for the message of the failure: where to go on from.
        """
        # Several processes save together, and the others do not know of the failure
        if self.model is not None and not self._opt["dist"]:
            try:
                self._save()
            except UserError as error:  # the weights have diverged, too
                return str(error)
        return what_is_saved(self._opt)

    # What the end calls

    def finish(self) -> None:
        """The training is over: write its report."""
        root = Path(self._opt["path"]["experiments_root"])
        # Of a run that found nothing left to do, the report would have no times
        if self.history is not None and (self._batches or not (root / "summary.md").is_file()):
            net = getattr(self.model, "net_g", None)  # models of other kinds than BasicSR's may have none
            count = None if net is None else sum(parameter.numel() for parameter in net.parameters())
            seconds, skipped = time.monotonic() - self._started, getattr(self.model, "skipped", 0)
            numbers: Any = {"seconds": seconds, "iterations": self.iteration, "skipped": skipped, "parameters": count}
            logger.info(write_report(root, self._opt, self.history, **numbers))
        if self.stop.signum is not None:  # during the last validation
            raise Stopped(self.stop.signum)

    def close(self) -> None:
        """Restore the terminal, and let go of what holds processes and threads."""
        self._agreement = Agreement()  # without the question that is on its way
        if self._log is not None:
            self._log.close()
            if self._log.tb_logger:
                self._log.tb_logger.flush()  # it writes every two minutes, and loses the rest when the process ends
        self.model = self.sampler = None
        self._val_loaders = []

    def _catch_up(self) -> None:
        """Do the validations of the state's iteration that the end of the run before cut off."""
        records = [] if self.history is None else self.history.records()
        here = {record.get("dataset") for record in records if record["iter"] == self._start_iteration}
        done, has_records = gather_objects((here, bool(records)))[0]
        due = self.is_over or self._start_iteration % int(self._opt["val"]["val_freq"]) == 0
        for loader in self._val_loaders:
            if _name_of(loader) in done:
                self.begins_validation(loader, self._start_iteration)
            elif due and has_records and getattr(self.model, "logs_complete_validations", False):
                save_img = self._opt["val"]["save_img"]
                self.model.validation(loader, self._start_iteration, self._log.tb_logger, save_img)

    def _save(self) -> bool:
        """Save a state, unless there is one of this iteration; True if it was done."""
        if self.iteration in (self._start_iteration, self.saved_iteration):
            return False
        self.model.save(self.sampler.epoch, self.iteration)
        return True


def _name_of(loader: Any) -> str:
    """Of a validation set; those of other packages may have none."""
    return str(getattr(loader.dataset, "opt", {}).get("name", id(loader)))


def what_is_saved(opt: Mapping[str, Any]) -> str:
    """Where a training that fails can go on from, a sentence."""
    states = saved_states(Path(opt["path"]["training_states"]))
    if not states:
        return "Nothing was saved before."
    return f"The last state is {states[-1]}: go on from it with --auto_resume."


def saved_states(folder: Path) -> list[Path]:
    """The files `ITERATION.state` in a folder, the newest last; OSError if it is there and cannot be read."""
    try:
        states = [path for path in folder.iterdir() if path.suffix == ".state" and path.stem.isdigit()]
    except FileNotFoundError:
        return []
    return sorted(states, key=lambda path: int(path.stem))
