"""Optimisers by name, and Muon on convolutions against torch's own Muon and AdamW."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from networks import max_error, normal
from torch import nn

from esc_arch import ESC, ESCLTE, ESCRIB, UserError
from esc_arch.options import check_options
from esc_arch.training import optimizers
from esc_arch.training.optimizers import OPTIMIZERS, build_optimizer, hidden_kernels, muon_groups

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon comes with PyTorch 2.9")

SMALL = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2}
MUON = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
ADAMW = {"adamw_lr": 0.003, "adamw_betas": [0.8, 0.99], "adamw_eps": 1e-7, "adamw_weight_decay": 0.02}


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 3), nn.PReLU(), nn.Conv2d(12, 3, 3)
    )


def give_gradients(net: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random).to(memory_format=torch.preserve_format)


def muon_of(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return build_optimizer("Muon", list(net.parameters()), nets=[net], **MUON | ADAMW | options)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(net, step)
        optimizer.step()


# --- by name ----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_torch() -> None:
    assert {"Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adafactor"} <= OPTIMIZERS.keys()
    assert OPTIMIZERS.keys().isdisjoint({"LBFGS", "SparseAdam", "Optimizer"})
    for kind in OPTIMIZERS.keys() - {"Muon"}:
        assert OPTIMIZERS[kind] is getattr(torch.optim, kind)
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones(2, 2)
        build_optimizer(kind, [parameter], nets=[], lr=0.1).step()
        assert (parameter < 1).all(), kind


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"The optimiser 'LBFGS' is not in torch\.optim, which has: .*AdamW.*SGD\.$"):
        build_optimizer("LBFGS", [], nets=[], lr=0.1)


def test_muon_that_this_torch_has_not(train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPTIMIZERS, "Muon", raising=False)
    with pytest.raises(UserError, match=r"'Muon' is not in .* Muon comes with PyTorch 2\.9, and this is \d"):
        build_optimizer("Muon", [], nets=[], lr=0.1)
    train_options["train"]["optim_g"] = {"type": "Muon", "lr": 0.1}
    (problem,) = check_options(train_options, True)
    assert str(problem) == f"train:optim_g:type: {optimizers.NO_MUON}. Use AdamW"


# --- Muon -------------------------------------------------------------------------------------------------------------


@needs_muon
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_is_torchs_muon_of_matrices_and_torchs_adamw(layout: torch.memory_format) -> None:
    net = small_net().to(memory_format=layout)
    matrix = nn.Parameter(net[2].weight.detach().flatten(1).clone(memory_format=torch.contiguous_format))
    others = copy.deepcopy(net)
    originals = [
        torch.optim.Muon([matrix], **MUON),
        torch.optim.AdamW(
            [p for name, p in others.named_parameters() if name != "2.weight"],
            lr=0.003, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.02,
        ),
    ]  # fmt: skip
    optimizer = muon_of(net)
    for step in range(3):
        give_gradients(net, step)
        give_gradients(others, step)
        matrix.grad = net[2].weight.grad.flatten(1)
        for each in (optimizer, *originals):
            each.step()
    assert torch.equal(net[2].weight.flatten(1), matrix)
    assert net[2].weight.is_contiguous(memory_format=layout)
    for (name, ours), theirs in zip(net.named_parameters(), others.parameters(), strict=True):
        if name != "2.weight":
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
            assert not torch.equal(ours, dict(small_net().named_parameters())[name])


def test_what_muon_is_for() -> None:
    net = ESC(upscaling_factor=2, **SMALL)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    block = [
        *("proj.proj", "proj.aggr", "attn.to_qkv", "attn.to_out", "pconvs.0.plk.dwc_proj.1"),
        *("pconvs.0.plk.dwc_proj.3", "pconvs.0.aggr", "convffns.0.proj", "convffns.0.aggr", "conv_out"),
    ]
    assert [names[id(parameter)] for parameter in hidden_kernels(net)] == [
        "plk_filter",
        *(f"blocks.0.{name}.weight" for name in block),
        "last.weight",
    ]


@needs_muon
@pytest.mark.parametrize("cls", [ESC, ESCRIB])
def test_one_optimiser_of_all_parameters(cls: Any) -> None:
    net = cls(upscaling_factor=2, **SMALL)
    optimizer = muon_of(net)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [(group["rule"], group["lr"]) for group in optimizer.param_groups] == [("muon", 0.02), ("adamw", 0.003)]
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in net.parameters())


def test_linear_layers_but_the_last_are_for_muon() -> None:
    net = ESCLTE(**SMALL, hidden_dim=8, mlp_dims=[8, 8])
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    hidden = {names[id(parameter)] for parameter in hidden_kernels(net)}
    linear = [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    assert [name in hidden for name in linear] == [True] * (len(linear) - 1) + [False]


@needs_muon
def test_learning_rates_of_groups() -> None:
    net = small_net()
    groups = [{"params": list(net[:3].parameters())}, {"params": list(net[3:].parameters()), "lr": 0.002}]
    optimizer = build_optimizer("Muon", groups, nets=[net], **MUON | ADAMW)
    assert [(group["rule"], group["lr"]) for group in optimizer.param_groups] == [
        ("muon", 0.02),
        ("adamw", 0.003),
        ("adamw", pytest.approx(0.0003)),
    ]
    same = build_optimizer("Muon", net.parameters(), nets=[net], lr=0.5)
    assert [group["lr"] for group in same.param_groups] == [0.5, 0.5]
    assert [group["rule"] for group in muon_groups(net.parameters(), [])] == ["adamw"]


@needs_muon
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_muon_goes_on_as_if_nothing_had_happened(layout: torch.memory_format) -> None:
    net = small_net()
    optimizer = muon_of(net)
    train(net, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(net).to(memory_format=layout)
    train(net, optimizer, range(2, 5))
    again = muon_of(resumed)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, again, range(2, 5))
    for ours, theirs in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_muon
def test_muon_with_scaled_gradients_clipping_and_parameters_without_gradient() -> None:
    net, plain = small_net(), small_net()
    optimizer, original = muon_of(net), muon_of(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.rand(1, 3, 12, 12)
    for each in (net, plain):
        each[0].requires_grad_(False)
    before = net[0].weight.clone()
    scaler.scale(net(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    scaler.step(optimizer)
    plain(x).square().mean().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    original.step()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(net[0].weight, before)
    assert not torch.equal(net[2].weight, small_net()[2].weight)


@needs_muon
def test_a_training_with_muon_can_be_resumed(train_options: Any, run_basicsr: Any) -> None:
    train_options["train"] |= {"optim_g": {"type": "Muon", **MUON, **ADAMW}, "total_iter": 4}
    whole = run_basicsr("train", train_options)
    assert whole.status == 0, whole.err
    state = torch.load(whole.experiment() / "training_states" / "2.state", weights_only=True)
    groups = state["optimizers"][0]["param_groups"]
    assert [group["rule"] for group in groups] == ["muon", "adamw"]
    expected = whole.weights(4)
    train_options["path"]["resume_state"] = str(whole.experiment() / "training_states" / "2.state")
    resumed = run_basicsr("train", train_options)
    assert resumed.status == 0, resumed.err
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.weights(4).items())


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "Adam", "lr": -1}, "train:optim_g: Adam: Invalid learning rate: -1"),
        ({"type": "AdamW", "lr": 1, "betas": [0.9, 2]}, "train:optim_g: AdamW: Invalid beta parameter at index 1: 2"),
        ({"type": "LBFGS", "lr": 1}, "train:optim_g:type: 'LBFGS' is not known. .*Allowed: .*AdamW"),
        pytest.param({"type": "Muon", "lr": 0}, "optim_g: Muon: lr is 0; Muon's must be above 0$", marks=needs_muon),
        pytest.param({"type": "Muon", "lr": 1, "adamw_lr": -1}, "Muon: Invalid learning rate: -1", marks=needs_muon),
        pytest.param({"type": "Muon", "lr": 1, "adjust_lr_fn": "x"}, "Adjust learning .* x is not", marks=needs_muon),
        pytest.param({"type": "Muon", "lr": 1, "betas": [0, 0]}, "Did you mean 'adamw_betas'", marks=needs_muon),
    ],
)
def test_values_that_are_not_allowed(section: Any, message: str, train_options: Any) -> None:
    train_options["train"]["optim_g"] = section
    (problem,) = check_options(train_options, True)
    assert re.search(message, str(problem))


# --- in one pass -----------------------------------------------------------------------------------------------------


def fused_of(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    parameters = [{"params": [nn.Parameter(torch.zeros(2, 2, device=device, dtype=dtype))], "lr": 0.1}]
    return build_optimizer(kind, parameters, nets=[], lr=1e-3, **options).param_groups[0].get("fused")


def test_rules_are_fused_on_the_cpu_unless_told_otherwise() -> None:
    assert fused_of("AdamW") is fused_of("Adam") is fused_of("SGD") is True
    assert fused_of("AdamW", fused=False) is False
    assert not fused_of("AdamW", foreach=True) and not fused_of("AdamW", differentiable=True)
    assert not fused_of("AdamW", device="meta") and not fused_of("AdamW", dtype=torch.float64)
    assert fused_of("RMSprop") is None  # which has no such rule


def test_a_fused_rule_is_the_same_rule() -> None:
    steps = {}
    for fused in (True, False):
        parameter = nn.Parameter(normal(5, 7))
        optimizer = build_optimizer("AdamW", [parameter], nets=[], lr=1e-2, fused=fused)
        for seed in range(5):
            parameter.grad = normal(5, 7, seed=seed)
            optimizer.step()
        steps[fused] = parameter.detach()
    assert max_error(steps[True], steps[False]) < 1e-6
