"""Freezing and learning rates by patterns of parameter names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from esc_arch import ESC, UserError
from esc_arch.options import check_options
from esc_arch.options.network_checks import check_networks
from esc_arch.training.parameter_groups import freeze, parameter_groups, pattern_problems

LR = 0.01


def small_esc() -> nn.Module:
    return ESC(dim=8, pdim=4, kernel_size=3, n_blocks=2, conv_blocks=1, window_size=4, num_heads=2, upscaling_factor=2)


def options(**changes: Any) -> dict[str, Any]:
    return {"optim_g": {"type": "Adam", "lr": LR}} | changes


def named_groups(net: nn.Module, **changes: Any) -> list[tuple[float | None, list[str]]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    freeze(net, options(**changes))
    groups = parameter_groups(net, options(**changes))
    return [(group.get("lr"), [names[id(parameter)] for parameter in group["params"]]) for group in groups]


def names_of(net: nn.Module, start: str = "") -> list[str]:
    return [name for name, _ in net.named_parameters() if name.startswith(start)]


@pytest.mark.parametrize("changes", [{}, {"freeze": None, "lr_factors": None}, {"freeze": [], "lr_factors": {}}])
def test_without_options_it_is_one_group_of_all(changes: Any) -> None:
    net = small_esc()
    net.proj.bias.requires_grad_(False)  # as third-party networks may
    expected = [name for name in names_of(net) if name != "proj.bias"]
    assert named_groups(net, **changes) == [(None, expected)]


def test_frozen_parameters_are_left_out_and_get_no_gradient(basicsr_log: pytest.LogCaptureFixture) -> None:
    net = small_esc()
    ((_, trained),) = named_groups(net, freeze=["blocks.*", "proj.weight"])
    assert trained == [name for name in names_of(net) if not name.startswith("blocks.") and name != "proj.weight"]
    net(torch.rand(1, 3, 8, 8)).sum().backward()
    untouched = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert untouched == ["proj.weight", *names_of(net, "blocks.")]
    line = (
        f"{len(untouched)} parameter tensors are frozen by train: freeze: blocks.*, proj.weight: proj.weight, blocks."
    )
    assert line in basicsr_log.text


def test_freezing_alone() -> None:
    net = small_esc()
    freeze(net, options(freeze=["to_img.?ias"]))
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["to_img.bias"]


def test_learning_rates_by_pattern_the_first_of_which_counts() -> None:
    net = small_esc()
    factors = {"*.bias": 2, "blocks.[1-9].*": 0.1, "to_img.*": 10}
    rest, biases, block, tail = named_groups(net, lr_factors=factors, freeze=["last.*"])
    assert [group[0] for group in (rest, biases, block, tail)] == pytest.approx([LR, 2 * LR, 0.1 * LR, 10 * LR])
    assert biases[1] == [name for name in names_of(net) if name.endswith(".bias") and name != "last.bias"]
    assert block[1] == [name for name in names_of(net, "blocks.1.") if not name.endswith(".bias")]
    assert tail[1] == ["to_img.weight"]
    assert {"plk_filter", "proj.weight", *names_of(net, "blocks.0.attn.to_qkv.weight")} <= set(rest[1])
    listed = rest[1] + biases[1] + block[1] + tail[1]
    assert sorted(listed) == sorted(set(names_of(net)) - {"last.weight", "last.bias"})


def test_a_pattern_of_all_parameters_leaves_no_empty_group() -> None:
    net = small_esc()
    assert named_groups(net, lr_factors={"*": 0.5}) == [(0.5 * LR, names_of(net))]


PROBLEMS = [
    (
        {"freeze": ["block.*"]},
        r"train:freeze: 'block\.\*' matches no parameter of ESC, which has plk_filter, .* and oth",
    ),
    ({"lr_factors": {"Blocks.*": 2}}, r"train:lr_factors: 'Blocks\.\*' matches no parameter of ESC"),
    ({"freeze": ["*"]}, r"train:freeze: \['\*'\] leave no parameter of ESC to be trained"),
    ({"lr_factors": {"proj.*": 2}, "freeze": ["proj.*"]}, r"train:lr_factors: 'proj\.\*' changes nothing: all that"),
    (
        {"lr_factors": {"blocks.*": 2, "blocks.0.*": 3}},
        r"'blocks\.0\.\*' changes nothing: .* follows an earlier pattern",
    ),
]


@pytest.mark.parametrize(("changes", "message"), PROBLEMS)
def test_patterns_that_do_not_go_with_the_network(changes: Any, message: str) -> None:
    (problem,) = pattern_problems(small_esc(), options(**changes))
    assert re.search(message, str(problem))
    with pytest.raises(UserError, match=message):
        parameter_groups(small_esc(), options(**changes))


@pytest.mark.parametrize(("changes", "message"), PROBLEMS)
def test_patterns_are_checked_before_the_run(changes: Any, message: str, train_options: Any) -> None:
    train_options["train"] |= changes
    (problem,) = check_networks(train_options, True)
    assert re.search(message, str(problem))
    assert list(check_networks(train_options, False)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "blocks.*"}, r"train:freeze: 'blocks\.\*' given; must be a list of texts"),
        ({"freeze": [1]}, r"train:freeze: \[1\] given; must be a list of texts"),
        ({"lr_factors": ["blocks.*"]}, r"train:lr_factors: .* given; must be a mapping"),
        ({"lr_factors": {"proj.*": 0}}, r"train:lr_factors:proj\.\*: 0 given; must be a number above 0.* freeze"),
        ({"lr_factors": {"proj.*": "2"}}, r"train:lr_factors:proj\.\*: '2' given; must be a number above 0"),
    ],
)
def test_forms_that_are_wrong(changes: Any, message: str, train_options: Any) -> None:
    train_options["train"] |= changes
    (problem,) = check_options(train_options, True)
    assert re.search(message, str(problem))


def test_a_training_with_them(train_options: Any, run_basicsr: Any) -> None:
    network = train_options["network_g"]
    torch.manual_seed(1)
    start = ESC(**{key: value for key, value in network.items() if key != "type"}).state_dict()
    torch.save({"params": start}, run_basicsr.folder / "start.pth")
    train_options["path"]["pretrain_network_g"] = "start.pth"
    train_options["train"] |= {
        "freeze": ["blocks.*"],
        "lr_factors": {"to_img.*": 10},
        "losses": {"fft": {"type": "FFTLoss", "loss_weight": 0.05}},
        "scheduler": {"type": "CosineAnnealingLR", "T_max": 4},
        "warmup_iter": 2,
    }
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert re.search(r"l_pix: \d.*l_fft: \d", run.log())
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, start[name]) == name.startswith("blocks."), name
