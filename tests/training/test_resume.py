"""An interrupted training goes on as if nothing had happened: faults 28, 30 and 32, signals, and old checkpoints."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esc_arch import ESCModel
from esc_arch.training.stopping import Stopped, StopRequest

TOTAL = 7  # of epochs of 3: 6 images in batches of 2


@pytest.fixture
def options(train_options: Any) -> Any:
    train_options["train"] |= {"total_iter": TOTAL, "warmup_iter": 3, "optim_g": {"type": "AdamW", "lr": 1e-2}}
    train_options["logger"]["save_checkpoint_freq"] = 100
    return train_options


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends this process a signal in the middle of an iteration; what comes after it in the iteration is done."""

    def arrange(iteration: int | None, signum: int = signal.SIGTERM) -> None:
        def feed_data(self: Any, data: Any) -> None:
            original(self, data)
            if self.is_train and self._iteration == iteration and "gt" in data and self.net_g.training:
                os.kill(os.getpid(), signum)

        original = vars(ESCModel).get("_original_feed_data", ESCModel.feed_data)
        monkeypatch.setattr(ESCModel, "_original_feed_data", original, raising=False)
        monkeypatch.setattr(ESCModel, "feed_data", feed_data)

    return arrange


def records(run: Any, name: str = "trial") -> list[dict[str, Any]]:
    """The history of a run, without what depends on time."""
    lines = (run.experiment(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("images_per_s", "time", "data_time", "memory_gib")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def interrupted(run_basicsr: Any, options: Any, status: int = 128 + signal.SIGTERM) -> Any:
    with pytest.raises(Stopped) as stopped:
        run_basicsr("train", options)
    assert stopped.value.code == status


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what several tests look at, made by the first of them."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def stopped_at_3(kept: Path, run_basicsr: Any, options: Any, stop_at: Callable[..., None]) -> None:
    """A run of `options` that was interrupted after its third iteration."""
    if not (kept / "experiments").exists():
        stop_at(3)
        interrupted(run_basicsr, copy.deepcopy(options))
        stop_at(None)
        shutil.copytree(run_basicsr.folder / "experiments", kept / "experiments")
    else:
        shutil.copytree(kept / "experiments", run_basicsr.folder / "experiments")


@pytest.fixture
def whole_run(kept: Path, run_basicsr: Any, options: Any) -> tuple[list[Any], Any]:
    """Weights and numbers of a run of `options` that was not interrupted, validated every three iterations."""
    file = kept / "whole.pth"
    if not file.exists():
        whole = copy.deepcopy(options)
        whole["val"]["val_freq"] = 3
        run = run_basicsr("train", whole | {"name": "whole"})
        assert run.status == 0, run.err
        weights = [run.weights(key=key, name="whole") for key in ("params", "params_ema")]
        torch.save((weights, records(run, "whole")), file)
    expected: tuple[list[Any], Any] = torch.load(file, weights_only=True)
    return expected


IN_MAIN_PROCESS = {"num_worker_per_gpu": 0}
PREFETCHED = {"num_worker_per_gpu": 1, "prefetch_mode": "cpu"}
WORKERS = {"num_worker_per_gpu": 2, "persistent_workers": False}


@pytest.mark.parametrize(
    ("loading", "iteration"),
    [(IN_MAIN_PROCESS, 2), (IN_MAIN_PROCESS, 3), (PREFETCHED, 2), (WORKERS, 4)],
    ids=["in the first epoch", "at its end and a validation", "first, prefetched", "second, workers"],
)
def test_30_a_resumed_run_is_bit_identical(
    loading: Any, iteration: int, run_basicsr: Any, options: Any, stop_at: Callable[..., None], whole_run: Any
) -> None:
    """To one that loads its data in the main process, too."""
    assert any("dataset" in record for record in whole_run[1])
    options["datasets"]["train"] |= loading
    options["val"]["val_freq"] = 3
    stop_at(iteration)
    interrupted(run_basicsr, options)
    folder = run_basicsr.folder / "experiments" / "trial"
    assert [path.name for path in (folder / "training_states").iterdir()] == [f"{iteration}.state"]
    assert not (folder / "models" / "net_g_latest.pth").exists()
    stop_at(None)
    resumed = run_basicsr("train", options, "--auto_resume")
    assert resumed.status == 0, resumed.err
    assert f"iter: {iteration}." in resumed.log()
    for key, weights in zip(("params", "params_ema"), whole_run[0], strict=True):
        assert all(torch.equal(weights[name], value) for name, value in resumed.weights(key=key).items())
    assert records(resumed) == whole_run[1]


def test_a_signal_during_a_validation_does_not_wait_for_its_end(
    run_basicsr: Any, options: Any, whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved, nothing half is logged, and the validation is done when the run is resumed."""
    options["val"]["val_freq"] = 3
    test, asked = ESCModel.test, []

    def stop_once(self: Any) -> None:
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(1)
        test(self)

    monkeypatch.setattr(ESCModel, "test", stop_once)
    interrupted(run_basicsr, options)
    assert len(asked) == 1  # of two images
    resumed = run_basicsr("train", options, "--auto_resume")
    assert resumed.status == 0, resumed.err
    assert records(resumed) == whole_run[1]


def test_a_signal_between_two_saves_saves_only_once(run_basicsr: Any, options: Any, stop_at: Any) -> None:
    options["logger"]["save_checkpoint_freq"] = 2
    stop_at(2, signal.SIGINT)
    saved: list[int] = []
    save = ESCModel.save

    def note(self: Any, epoch: int, iteration: int) -> None:
        saved.append(iteration)
        save(self, epoch, iteration)

    ESCModel.save = note
    try:
        interrupted(run_basicsr, options, 128 + signal.SIGINT)
    finally:
        ESCModel.save = save
    assert saved == [2]


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("esc_arch.training.stopping.time.monotonic", lambda: now[0])
    request = StopRequest()
    before = signal.getsignal(signal.SIGINT)
    with request.listening():
        assert not request
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same, handed on by a parent
        assert request.signum == signal.SIGINT
        now[0] += 10
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_32_the_last_validation_is_of_the_last_iteration(whole_run: Any) -> None:
    assert [record["iter"] for record in whole_run[1] if "dataset" in record] == [3, 6, TOTAL]


@pytest.mark.parametrize(
    ("val_freq", "model", "save_freq"),
    [(3, "ESCModel", 2), (1000, "ESCModel", 3), (3, "SRModel", 3)],
)
def test_a_finished_run_is_called_so_and_repeats_nothing(
    val_freq: int, model: str, save_freq: int, run_basicsr: Any, train_options: Any
) -> None:
    """The last validation is one, also where val_freq divides total_iter; and the state of the end is always there."""
    train_options |= {"model_type": model}
    train_options["train"]["total_iter"] = 3
    train_options["val"]["val_freq"] = val_freq
    train_options["logger"]["save_checkpoint_freq"] = save_freq
    first = run_basicsr("train", copy.deepcopy(train_options))
    assert first.status == 0, first.err
    figures = (first.experiment() / "metrics.jsonl").read_text()
    summary = (first.experiment() / "summary.md").read_text()
    assert [json.loads(line)["iter"] for line in figures.splitlines() if "dataset" in line] == [3]
    again = run_basicsr("train", copy.deepcopy(train_options), "--auto_resume")
    assert again.status == 0, again.err
    assert "This training is finished: its last state is of iteration 3, and train: total_iter is 3." in again.log()
    assert "# psnr" not in again.log()
    assert (first.experiment() / "metrics.jsonl").read_text() == figures
    assert (first.experiment() / "summary.md").read_text() == summary
    train_options["train"]["total_iter"] = 5
    further = run_basicsr("train", train_options, "--auto_resume")
    assert further.status == 0 and "training is finished" not in further.log() and "# psnr" in further.log()


@pytest.mark.usefixtures("stopped_at_3")
def test_28_edited_rates_are_warned_of(run_basicsr: Any, options: Any) -> None:
    options["train"]["optim_g"]["lr"] = 1e-3
    options["train"]["scheduler"] |= {"milestones": [5], "gamma": 0.1}
    run = run_basicsr("train", options, "--auto_resume")
    assert run.status == 0, run.err
    log = run.log()
    assert "The learning rate of the option file (0.001) is ignored: a resumed run goes on with 0.01." in log
    assert "train:scheduler:milestones of the option file ([5]) is ignored: a resumed run goes on with [3]." in log
    assert "train:scheduler:gamma of the option file (0.1) is ignored" in log


@pytest.mark.usefixtures("stopped_at_3")
def test_nothing_is_warned_of_when_nothing_was_edited(run_basicsr: Any, options: Any) -> None:
    assert "is ignored" not in run_basicsr("train", options, "--auto_resume").log()


@pytest.mark.usefixtures("stopped_at_3")
def test_a_state_of_another_optimiser_is_refused(run_basicsr: Any, options: Any) -> None:
    options["train"]["freeze"] = ["proj.*"]
    run = run_basicsr("train", options, "--auto_resume")
    assert run.status == 2
    assert "3.state does not fit the optimisers of the option file" in run.err


@pytest.mark.parametrize(
    "section",
    [
        {"type": "OneCycleLR", "max_lr": 0.01, "total_steps": 20},
        {"type": "StepLR", "step_size": 3, "gamma": 0.5},
        {"type": "CosineAnnealingRestartLR", "periods": [20]},
    ],
    ids=lambda section: section["type"],
)
@pytest.mark.usefixtures("stopped_at_3")
def test_a_state_of_another_schedule_is_refused(section: Any, run_basicsr: Any, options: Any) -> None:
    """Half of either would be followed, and OneCycleLR miss what it keeps in the optimiser."""
    options["train"]["scheduler"] = section
    run = run_basicsr("train", options, "--auto_resume")
    assert run.status == 2 and "Traceback" not in run.err
    assert f"train: scheduler: type is {section['type']}, and the state was saved by another, which has" in run.err
    assert "milestones" in run.err and "is ignored" not in run.err


@pytest.mark.parametrize("file", ["training_states/4.state", "models/net_g_4.pth"])
def test_a_state_that_is_not_numbers_is_skipped(file: str, run_basicsr: Any, options: Any) -> None:
    """Going on from it would lose the run."""
    options["train"]["total_iter"] = 4
    options["logger"]["save_checkpoint_freq"] = 2
    run = run_basicsr("train", options)
    path = run.experiment() / file
    content = torch.load(path, weights_only=True)
    spoiled = content["params_ema"] if "params_ema" in content else content["optimizers"][0]["state"][0]
    next(value for value in spoiled.values() if value.ndim > 1).view(-1)[0] = float("nan")
    torch.save(content, path)
    options["path"]["resume_state"] = str(run.experiment() / "training_states" / "4.state")
    given = run_basicsr("train", options)
    assert given.status == 2 and "with 1 of " in given.err.splitlines()[-1] and str(path) in given.err.splitlines()[-1]
    options["path"]["resume_state"] = None
    resumed = run_basicsr("train", options, "--auto_resume")
    assert resumed.status == 0, resumed.err
    assert resumed.err.count("--auto_resume skips a state: ") == 1
    assert "Resuming training from epoch: 0, iter: 2." in resumed.log()


def test_a_drawn_seed_is_kept(run_basicsr: Any, options: Any, stop_at: Any) -> None:
    del options["manual_seed"]
    stop_at(3)
    interrupted(run_basicsr, options)
    stop_at(None)
    state = torch.load(run_basicsr.folder / "experiments/trial/training_states/3.state", weights_only=True)
    run = run_basicsr("train", options, "--auto_resume")
    assert f"manual_seed: {state['manual_seed']}\n" in run.log()


def test_best_results_are_kept(run_basicsr: Any, options: Any, stop_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 30 too: a resumed run of BasicSR's forgets them."""
    values = iter([30.0] + [20.0] * 50)
    monkeypatch.setattr("esc_arch.models.esc_model.calculate_metric", lambda *_: next(values))
    options["val"] = {"val_freq": 2, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}}
    stop_at(5)
    interrupted(run_basicsr, options)
    stop_at(None)
    assert "Best: 25.0000 @ 2 iter" in run_basicsr("train", options, "--auto_resume").log()


def models_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models").iterdir())


def test_old_checkpoints_are_removed_but_the_best(
    run_basicsr: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options["logger"] |= {"save_checkpoint_freq": 1, "keep_last": 2}
    options["val"] = {"val_freq": 2, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}}
    values = iter([30.0, 30.0] + [20.0] * 20)
    monkeypatch.setattr("esc_arch.models.esc_model.calculate_metric", lambda *_: next(values))
    run = run_basicsr("train", options)
    assert run.status == 0, run.err
    assert models_of(run.experiment()) == ["net_g_2.pth", "net_g_6.pth", "net_g_7.pth", "net_g_latest.pth"]
    assert sorted(path.name for path in (run.experiment() / "training_states").iterdir()) == ["6.state", "7.state"]


def test_the_best_is_there_though_its_iteration_saves_nothing(
    run_basicsr: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options["logger"] |= {"save_checkpoint_freq": 3, "keep_last": 1}
    options["val"] = {"val_freq": 2, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}}
    values = iter([20.0] * 4 + [30.0, 30.0] + [20.0] * 20)  # bicubic's, too, in the first validation
    monkeypatch.setattr("esc_arch.models.esc_model.calculate_metric", lambda *_: next(values))
    run = run_basicsr("train", options)
    assert models_of(run.experiment()) == ["net_g_4.pth", "net_g_7.pth", "net_g_latest.pth"]
    assert run.weights(4).keys() == run.weights(4, "params_ema").keys()


@pytest.mark.usefixtures("stopped_at_3")
def test_a_run_that_basicsr_saved_can_be_resumed(run_basicsr: Any, options: Any) -> None:
    """Its states have four entries; the epoch then starts over."""
    path = run_basicsr.folder / "experiments/trial/training_states/3.state"
    state = torch.load(path, weights_only=True)
    torch.save({key: state[key] for key in ("epoch", "iter", "optimizers", "schedulers")}, path)
    run = run_basicsr("train", options, "--auto_resume")
    assert run.status == 0, run.err
    assert (run.experiment() / "models" / "net_g_latest.pth").is_file()


def test_22_prefetching_threads_end_with_the_run(run_basicsr: Any, options: Any) -> None:
    import threading

    options["datasets"]["train"] |= {"num_worker_per_gpu": 1, "prefetch_mode": "cpu", "num_prefetch_queue": 3}
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert run_basicsr("train", options).status == 0
    assert not [thread for thread in set(threading.enumerate()) - before if "Prefetch" in type(thread).__name__]
