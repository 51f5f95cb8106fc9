"""Replacements in basicsr 1.4.2 that hang `esc_arch.training` on its training loop."""

from __future__ import annotations

import functools
import math
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Full
from typing import Any

from esc_arch.errors import UserError, message_of

from .patches import patch
from .safe_output import is_end_of_worker, system_faults_named, worker_killed
from .safe_training import save_atomically

__all__: list[str] = []


@patch("basicsr.train", "train_pipeline", "a training stops when asked to, all saved, and ends with a report")
def _train_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_pipeline(root_path: str) -> None:
        from esc_arch.training.run import training_run

        with training_run() as run, system_faults_named():
            try:
                original(root_path)
                run.finish()
            finally:
                stop_prefetching()

    return train_pipeline


# --- data -----------------------------------------------------------------------------------------------------------


@patch("basicsr.data.data_sampler", "EnlargedSampler", "an epoch can be begun in the middle")
def _enlarged_sampler(original: type[Any]) -> type[Any]:
    from esc_arch.training.data_order import EpochSampler

    return EpochSampler


@patch("basicsr.data", "build_dataloader", "what a sample is does not depend on workers, processes and interruptions")
def _build_dataloader(original: Callable[..., Any]) -> Callable[..., Any]:
    from esc_arch.training.data_order import SeededDataset

    @functools.wraps(original)
    def build_dataloader(dataset: Any, dataset_opt: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if dataset_opt["phase"] == "train":
            dataset = SeededDataset(dataset)
        return original(dataset, dataset_opt, *args, **kwargs)

    return build_dataloader


@patch("basicsr.train", "create_train_val_dataloader", "a run does total_iter iterations, or is refused")
def _create_train_val_dataloader(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_train_val_dataloader(opt: dict[str, Any], logger: Any) -> Any:
        from esc_arch.training.run import current_run

        result = original(opt, logger)
        train_loader, train_sampler, val_loaders, epochs, iterations = result
        options = opt["datasets"]["train"]
        if len(train_loader) == 0:
            raise UserError(
                f"datasets: train ({options.get('name')}) has {len(train_loader.dataset)} images, fewer than one batch "
                f"of {train_loader.batch_size}, so that no iteration would be done. Lower batch_size_per_gpu, raise "
                f"dataset_enlarge_ratio, or add images."
            )
        for loader in val_loaders:
            if len(loader.dataset) == 0:
                raise UserError(
                    f"The validation set {loader.dataset.opt['name']} has no images: check its dataroot_lq."
                )
        if (run := current_run()) is not None:
            run.has_data(opt, train_loader, val_loaders)
        # BasicSR counts the last, incomplete batch of an epoch, which is left out, and would stop too early
        epochs = max(epochs, math.ceil(iterations / len(train_loader)))
        return train_loader, train_sampler, val_loaders, epochs, iterations

    return create_train_val_dataloader


def _with_hooks(prefetcher: type[Any]) -> type[Any]:
    """BasicSR's prefetcher; the training's hooks before and after each batch, and no first iteration to throw away."""

    class Prefetcher(prefetcher):
        def __init__(self, loader: Any, *args: Any) -> None:
            super().__init__(_Nothing(), *args)  # it would start workers, which `reset` starts again
            self.ori_loader = loader

        def reset(self) -> None:
            from esc_arch.training.run import current_run

            stop_prefetching()  # persistent workers must not be asked by two threads
            run = current_run()
            if run is not None:
                run.epoch_begins()
            if run is None or not run.is_over:
                super().reset()

        def next(self) -> Any:
            from esc_arch.training.run import current_run

            run = current_run()
            if run is not None and not run.before_batch():
                return None
            with _rescuing():
                batch = super().next()
            if run is not None and batch is not None:
                run.has_batch()
            return batch

    return Prefetcher


@contextmanager
def _rescuing() -> Iterator[None]:
    """Around what happens between two iterations: should it fail, no iteration is lost that was done.

    Raises:
        UserError: what the user can fix, and where to go on from then.
    """
    from esc_arch.training.run import current_run

    try:
        yield
    except Exception as error:
        run = current_run()
        if run is None:
            raise
        saved = run.rescue()
        # A data loader in its frames would keep its workers waiting when the process ends
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError):
            raise UserError(f"{message_of(error)} {saved}") from error
        if is_end_of_worker(error):
            raise UserError(f"{worker_killed(error)} {saved}") from error
        raise


@patch("basicsr.models.base_model", "BaseModel.validation", "none is done twice, and one that fails loses no iteration")
def _validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validation(self: Any, dataloader: Any, current_iter: Any, *args: Any, **kwargs: Any) -> None:
        from esc_arch.training.run import current_run

        run = current_run()
        if run is not None and run.is_validated(dataloader, current_iter):
            return
        with _rescuing():
            original(self, dataloader, current_iter, *args, **kwargs)
        if run is not None:
            run.has_validated(dataloader, current_iter)

    return validation


@patch("basicsr.models.sr_model", "SRModel._log_validation_metric_values", "metrics.jsonl has validations")
def _log_validation_metric_values(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def log_validation_metric_values(self: Any, current_iter: Any, dataset_name: str, tb_logger: Any) -> None:
        from esc_arch.training.run import current_run

        original(self, current_iter, dataset_name, tb_logger)
        if (run := current_run()) is not None and run.history is not None:
            run.history.append({"iter": current_iter, "dataset": dataset_name, **self.metric_results})

    return log_validation_metric_values


class _Nothing:
    """A loader without batches."""

    def __iter__(self) -> Any:
        return iter(())


patch("basicsr.data.prefetch_dataloader", "CPUPrefetcher", "hooks before and after each batch")(_with_hooks)
patch("basicsr.data.prefetch_dataloader", "CUDAPrefetcher", "hooks before and after each batch")(_with_hooks)


class _Failure:
    """What the thread that loads data hands on when it fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


#: Threads that load data, as long as somebody may want their batches.
_prefetching: weakref.WeakSet[Any] = weakref.WeakSet()
#: How long (seconds) a thread waits before it looks whether it is to end.
_PATIENCE = 0.2


def stop_prefetching() -> None:
    """End the threads that load data: the interpreter would abort if one were at work when it ends (fault 22)."""
    for thread in list(_prefetching):
        thread.stopping.set()
    for thread in list(_prefetching):
        thread.join()
        _prefetching.discard(thread)


@patch("basicsr.data.prefetch_dataloader", "PrefetchGenerator.__init__", "its threads can be ended")
def _prefetch_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.stopping = threading.Event()
        _prefetching.add(self)
        original(self, *args, **kwargs)

    return __init__


@patch("basicsr.data.prefetch_dataloader", "PrefetchGenerator.run", "a failure while prefetching ends the wait for it")
def _prefetch_run(original: Callable[..., Any]) -> Callable[..., Any]:
    def put(self: Any, item: Any) -> None:
        while not self.stopping.is_set():
            try:
                return self.queue.put(item, timeout=_PATIENCE)
            except Full:
                continue

    @functools.wraps(original)
    def run(self: Any) -> None:
        try:
            for item in self.generator:
                put(self, item)
                if self.stopping.is_set():
                    return
            put(self, None)
        except BaseException as error:  # whatever it is, the training waits for something
            put(self, _Failure(error))

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


# --- model and log --------------------------------------------------------------------------------------------------


@patch("basicsr.models", "build_model", "what the loop leaves to itself knows the model")
def _build_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_model(opt: dict[str, Any]) -> Any:
        from esc_arch.training.run import current_run

        model = original(opt)
        if (run := current_run()) is not None:
            run.has_model(model)
        return model

    return build_model


@patch("basicsr.utils.logger", "MessageLogger", "a progress bar, images per second, memory, metrics.jsonl")
def _message_logger(original: type[Any]) -> type[Any]:
    from esc_arch.training.progress import TrainingLog

    class RunLog(TrainingLog):
        def __init__(self, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
            from esc_arch.training.run import current_run

            super().__init__(opt, start_iter, tb_logger)
            if (run := current_run()) is not None:
                run.begins(self, start_iter)

    return RunLog


@patch("basicsr.utils.logger", "init_wandb_logger", "current wandb, and a resumed run goes on in the same one")
def _init_wandb_logger(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_wandb_logger(opt: dict[str, Any]) -> None:
        from esc_arch.training.progress import init_wandb

        init_wandb(opt)

    return init_wandb_logger


# --- states ---------------------------------------------------------------------------------------------------------


@patch("basicsr.models.base_model", "BaseModel.save_training_state", "states are whole, and have all to go on from")
def _save_training_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
        from esc_arch.training.run import current_run
        from esc_arch.training.states import prune, training_state

        if current_iter == -1:  # the end of training: there is nothing to go on with
            if self.opt["rank"] == 0:
                prune(self)
            return
        content = training_state(self, epoch, current_iter)
        if (run := current_run()) is not None:
            run.saved_iteration = current_iter
        path = Path(self.opt["path"]["training_states"], f"{current_iter}.state")
        if self.opt["rank"] == 0 and save_atomically(content, path, last=False):
            prune(self)

    return save_training_state


@patch("basicsr.models.base_model", "BaseModel.resume_training", "a resumed run is as if it had not stopped")
def _resume_training(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
        from esc_arch.training.states import apply_state

        apply_state(self, resume_state, original)

    return resume_training


@patch("basicsr.models.sr_model", "SRModel.dist_validation", "while one process validates, the others wait for it")
def _dist_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def dist_validation(self: Any, *args: Any, **kwargs: Any) -> None:
        from esc_arch.training.distributed import wait_for_all

        original(self, *args, **kwargs)
        wait_for_all()

    return dist_validation
