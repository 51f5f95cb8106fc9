"""What is set for loading where an option file leaves it open: faults 21 and 30; and what a warm-up does: fault 29."""

from __future__ import annotations

from typing import Any

import pytest

from esc_arch.options.defaults import set_defaults


def loading(train_options: Any, **options: Any) -> Any:
    train_options["datasets"]["train"] |= options
    set_defaults(train_options, is_train=True)
    return train_options["datasets"]["train"]


@pytest.mark.parametrize("workers", [1, 4])
def test_21_workers_live_on_after_an_epoch(workers: int, train_options: Any) -> None:
    assert loading(train_options, num_worker_per_gpu=workers)["persistent_workers"] is True


@pytest.mark.parametrize("options", [{"num_worker_per_gpu": 4, "persistent_workers": False}, {"num_worker_per_gpu": 0}])
def test_21_unless_told_otherwise_or_there_are_none(options: Any, train_options: Any) -> None:
    assert not loading(train_options, **options).get("persistent_workers")


def test_30_prefetching_without_workers_is_off(train_options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its thread would draw random numbers while the training does."""
    assert loading(train_options, num_worker_per_gpu=0, prefetch_mode="cpu")["prefetch_mode"] is None
    assert "datasets:train:prefetch_mode is off: without workers" in capsys.readouterr().err


def test_30_prefetching_from_workers_stays(train_options: Any) -> None:
    assert loading(train_options, num_worker_per_gpu=1, prefetch_mode="cpu")["prefetch_mode"] == "cpu"


def test_pictures_without_tensorboard_are_no_error(train_options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train_options["val"]["tb_images"] = 3
    set_defaults(train_options, is_train=True)
    assert "val:tb_images shows nothing: TensorBoard is off" in capsys.readouterr().err


def test_29_a_warm_up_ends_one_step_short(make_model: Any, train_options: Any) -> None:
    """As in BasicSR, whose rates published networks were trained with; docs/training.md says so."""
    train_options["train"]["scheduler"] = {"type": "MultiStepLR", "milestones": [100]}
    model = make_model(train=train_options["train"])
    rates = []
    for iteration in range(1, 8):
        model.update_learning_rate(iteration, warmup_iter=4)
        rates.append(model.get_current_learning_rate()[0])
    assert rates == pytest.approx([1e-3 * step / 4 for step in (1, 2, 3, 3, 3, 3, 3)])
