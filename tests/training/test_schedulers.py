"""Schedules by name, and that a warm-up does not change what follows it."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from basicsr.models.lr_scheduler import MultiStepRestartLR
from torch import nn
from torch.optim import lr_scheduler

from esc_arch import UserError
from esc_arch.options import check_options
from esc_arch.training.schedulers import SCHEDULERS, TORCH_SCHEDULERS, build_scheduler

TOTAL = 12
SECTIONS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.25, "total_iters": 7},
    "CosineAnnealingLR": {"T_max": TOTAL, "eta_min": 1e-4},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": TOTAL},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": TOTAL},
    "PolynomialLR": {"total_iters": TOTAL, "power": 2.0},
    "StepLR": {"step_size": 3, "gamma": 0.5},
}

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")


def sgd(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=rates[0], momentum=0.9)


def rates_of(model: Any, warm_up: int = -1, first: int = 1) -> list[list[float]]:
    """The rates of a training's iterations, as BasicSR's loop sets them."""
    rates = []
    for iteration in range(first, TOTAL + 1):
        model.update_learning_rate(iteration, warm_up)
        rates.append([group["lr"] for group in model.optimizer_g.param_groups])
    return rates


@pytest.fixture
def train_with(make_model: Any, train_options: Any) -> Any:
    def make(kind: str) -> Any:
        section = {"type": kind} | SECTIONS[kind]
        changes = {"optim_g": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "scheduler": section, "total_iter": TOTAL}
        return make_model(train=train_options["train"] | changes)

    return make


def test_all_are_tested() -> None:
    assert SECTIONS.keys() == TORCH_SCHEDULERS.keys()
    assert SCHEDULERS["MultiStepLR"] is MultiStepRestartLR


@pytest.mark.parametrize("kind", SECTIONS)
def test_schedule_is_torchs(kind: str, train_with: Any) -> None:
    optimizer = sgd(0.1)
    original = getattr(lr_scheduler, kind)(optimizer, **SECTIONS[kind])
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(TOTAL - 1):
        original.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert len(set(expected)) > 1
    assert [rate for (rate,) in rates_of(train_with(kind))] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_warm_up_does_not_change_what_follows_it(kind: str, train_with: Any) -> None:
    without, with_warm_up = rates_of(train_with(kind)), rates_of(train_with(kind), warm_up=5)
    assert with_warm_up[4:] == without[4:]
    (initial,) = {group["initial_lr"] for group in train_with(kind).optimizer_g.param_groups}
    assert [rate for (rate,) in with_warm_up[:4]] == pytest.approx([initial * i / 5 for i in (1, 2, 3, 4)])


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("saved_at", [3, 8])
def test_a_resumed_schedule_goes_on(kind: str, saved_at: int, train_with: Any) -> None:
    expected = rates_of(train_with(kind), warm_up=5)
    model = train_with(kind)
    for iteration in range(1, saved_at + 1):
        model.update_learning_rate(iteration, 5)
    file = io.BytesIO()
    torch.save([model.optimizer_g.state_dict(), model.schedulers[0].state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = train_with(kind)
    resumed.optimizer_g.load_state_dict(states[0])
    resumed.schedulers[0].load_state_dict(states[1])
    assert rates_of(resumed, warm_up=5, first=saved_at + 1) == expected[saved_at:]


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR", "CosineAnnealingLR"])
def test_groups_keep_the_ratio_of_their_rates(kind: str) -> None:
    optimizer = sgd(0.1, 0.01)
    schedule = build_scheduler(kind, optimizer, **SECTIONS[kind] | ({"eta_min": 0.0} if "Cosine" in kind else {}))
    for _ in range(TOTAL - 1):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.1 * first)
        schedule.step()


def test_basicsrs_schedules_stay_as_they_are(make_model: Any) -> None:
    model = make_model()
    assert type(model.schedulers[0]) is MultiStepRestartLR


def test_an_unknown_schedule(make_model: Any, train_options: Any) -> None:
    with pytest.raises(
        UserError, match=r"The schedule 'StepsLR' is not known\. Did you mean 'StepLR'\? .*PolynomialLR"
    ):
        make_model(train=train_options["train"] | {"scheduler": {"type": "StepsLR"}})


@pytest.mark.parametrize("kind", SECTIONS)
def test_options_that_are_right(kind: str, train_options: Any) -> None:
    train_options["train"]["scheduler"] = {"type": kind} | SECTIONS[kind]
    assert check_options(train_options, True) == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "ReduceLROnPlateau"}, "train:scheduler:type: 'ReduceLROnPlateau' is not known. .*CosineAnnealingLR"),
        ({"type": "CosineAnnealingLR"}, "train:scheduler:T_max: missing; CosineAnnealingLR needs it"),
        ({"type": "StepLR", "step_size": 3, "gama": 1}, "scheduler:gama: StepLR has no such argument. Did .*'gamma'"),
        (
            {"type": "CyclicLR", "base_lr": 1, "max_lr": 2, "scale_fn": "exec"},
            "train:scheduler:scale_fn: CyclicLR has no such argument",
        ),
        ({"type": "OneCycleLR", "max_lr": 1}, "train:scheduler: OneCycleLR: You must define either total_steps OR"),
        (
            {"type": "OneCycleLR", "max_lr": 1, "total_steps": 3},
            "OneCycleLR ends after 3 iterations, before train:total_iter 4. Raise total_steps",
        ),
        ({"type": "LinearLR", "start_factor": 0}, "train:scheduler: LinearLR: Starting multiplicative factor expected"),
    ],
)
def test_options_that_are_wrong(section: Any, message: str, train_options: Any) -> None:
    train_options["train"]["scheduler"] = section
    (problem,) = check_options(train_options, True)
    assert re.search(message, str(problem))
