"""Whose an optimiser's state is: states with names, without, in the published order, in that of earlier versions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_real import use_small_vgg19

from esc_arch import UserError, archs
from esc_arch.training.states import apply_state, training_state

GOLDEN = Path(__file__).parents[1] / "golden" / "parameter_order.json"
ORDERS: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
SMALL = {"dim": 8, "pdim": 4, "kernel_size": 5, "n_blocks": 2, "conv_blocks": 2, "window_size": 4, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "ESC": {"use_ln": True, "upscaling_factor": 2},
    "ESCFP": {"upscaling_factor": 2},
    "ESCReal": {},
    "ESCReal dysample": {"use_dysample": True},
    "ESCRealM": {"upscaling_factor": 2},
    "ESCRIB": {"upscaling_factor": 2, "gate_type": "DWC"},
    "ESCLTE": {"hidden_dim": 8, "mlp_dims": [8]},
}
IN_BLOCKS = ["ln_proj", "proj", "ln_attn", "attn", "lns", "pconvs", "convffns", "ln_out", "conv_out"]
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon comes with PyTorch 2.9")


# --- the order of the networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        net = getattr(archs, name.partition("_")[0])(**ORDERS[name]["options"])
    assert [name for name, _ in net.named_parameters()] == ORDERS[name]["order"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_are_in_the_published_order_in_every_network(kind: str) -> None:
    net = getattr(archs, kind.partition(" ")[0])(**SMALL | NETWORKS[kind])
    for index in range(2):
        parts = [name.split(".")[2] for name, _ in net.named_parameters() if name.startswith(f"blocks.{index}.")]
        expected = [part for part in IN_BLOCKS if part in parts]
        assert list(dict.fromkeys(parts)) == expected and len(expected) >= 8


# --- states of every kind -------------------------------------------------------------------------------------------


def earlier(names: list[str]) -> list[str]:
    """In the order in which networks were once registered, from their names in any order."""
    first = ["plk_filter", "lk_channel", "lk_spatial"]
    last = ["ln_last", "last", "to_img", "upsampler", "lte"]
    real = any(name.startswith("skip.") for name in names)
    tops = [*first, "blocks", "last", "proj", "skip", "to_img"] if real else [*first, "proj", "blocks", *last]
    blocks = [f"blocks.{index}.{part}" for index in range(2) for part in [*IN_BLOCKS[:5], "convffns", "pconvs",
                                                                          *IN_BLOCKS[7:]]]  # fmt: skip
    prefixes = [prefix for top in tops for prefix in (blocks if top == "blocks" else [top])]
    ordered = [name for prefix in prefixes for name in names if f"{name}.".startswith(f"{prefix}.")]
    assert sorted(ordered) == sorted(names)
    return ordered


@pytest.fixture
def make_trained(make_model: Callable[..., Any], train_options: Any) -> Callable[..., Any]:
    """A model whose optimisers have made two steps with random gradients (or none)."""

    def make(kind: str = "ESC", steps: int = 2, network: Any = None, **train: Any) -> Any:
        options = {"type": kind.partition(" ")[0], **SMALL, **NETWORKS[kind], **(network or {})}
        model_type = "ESCLTEModel" if kind == "ESCLTE" else "ESCModel"
        model = make_model(network_g=options, model_type=model_type, train=train_options["train"] | train)
        take_steps(model, steps)
        return model

    return make


def take_steps(model: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for optimizer in model.optimizers:
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    """As BasicSR saves it: of every optimiser the groups and the entries by place, and nothing else."""
    plain = {key: copy.deepcopy(state[key]) for key in ("epoch", "iter", "optimizers", "schedulers")}
    for saved in plain["optimizers"]:
        del saved["type"]
        for group in saved["param_groups"]:
            del group["param_names"]
    return plain


def in_earlier_order(state: dict[str, Any]) -> dict[str, Any]:
    """As earlier versions saved it: without names, in their order, and with what BasicSR's states do not have."""
    old = copy.deepcopy(state)
    for number, saved in enumerate(old["optimizers"]):
        del saved["type"]
        entries, place = {}, 0
        for group in saved["param_groups"]:
            places = dict(zip(group.pop("param_names"), group["params"], strict=True))
            names = [name.removeprefix("net_g.") for name in places]
            for name in names if number else earlier(names):
                entry = places.get(f"net_g.{name}", places.get(name))
                if entry in saved["state"]:
                    entries[place] = saved["state"][entry]
                place += 1
        saved["state"] = entries
    return old


FORMS = {"with names": lambda state: state, "published": without_names, "earlier version": in_earlier_order}


def resumed(state: dict[str, Any], model: Any) -> None:
    apply_state(model, state, type(model).__mro__[-2].resume_training.__wrapped__)


def entries_by_name(model: Any) -> dict[str, Any]:
    names = {id(p): f"{net}.{name}" for net in ("net_g", "net_d") if hasattr(model, net)
             for name, p in getattr(model, net).named_parameters()}  # fmt: skip
    return {names[id(p)]: entry for optimizer in model.optimizers for p, entry in optimizer.state.items()}


def assert_same_states(ours: Any, theirs: Any) -> None:
    expected, found = entries_by_name(theirs), entries_by_name(ours)
    assert found.keys() == expected.keys() and expected
    for name, entry in expected.items():
        assert found[name].keys() == entry.keys(), name
        assert all(torch.equal(torch.as_tensor(found[name][key]), torch.as_tensor(entry[key])) for key in entry), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_states_of_every_network(kind: str, form: str, make_trained: Any) -> None:
    trained, again = make_trained(kind), make_trained(kind, steps=0)
    resumed(FORMS[form](training_state(trained, 1, 2)), again)
    assert_same_states(again, trained)
    take_steps(again, 1)
    assert all("param_names" not in group for group in again.optimizer_g.param_groups)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "train",
    [
        {"freeze": ["blocks.0.*", "skip.0.*"], "lr_factors": {"*.aggr.*": 2, "blocks.1.*": 0.5}},
        {"optim_g": {"type": "SGD", "lr": 1e-3, "momentum": 0.9}},
        {"optim_g": {"type": "Adafactor", "lr": 1e-3}},
        pytest.param({"optim_g": {"type": "Muon", "lr": 1e-3}}, marks=needs_muon),
        pytest.param({"optim_g": {"type": "Muon", "lr": 1e-3}, "lr_factors": {"*.bias": 2}}, marks=needs_muon),
    ],
    ids=["groups", "SGD", "Adafactor", "Muon", "Muon with groups"],
)
def test_states_of_groups_and_other_optimisers(train: Any, form: str, make_trained: Any) -> None:
    trained, again = make_trained("ESCReal", **train), make_trained("ESCReal", steps=0, **train)
    resumed(FORMS[form](training_state(trained, 1, 2)), again)
    assert_same_states(again, trained)


@needs_muon
@pytest.mark.parametrize(("kind", "last"), [("ESCReal", "to_img.8"), ("ESCRealM", "to_img.0"), ("ESC", "to_img")])
def test_muon_has_the_groups_that_it_had(kind: str, last: str, make_trained: Any) -> None:
    model = make_trained(kind, steps=0, optim_g={"type": "Muon", "lr": 1e-3})
    groups = training_state(model, 1, 2)["optimizers"][0]["param_groups"]
    first = "proj" if kind == "ESC" else "blocks.0.proj.proj"
    assert {f"net_g.{first}.weight", f"net_g.{last}.weight"} <= set(groups[1]["param_names"])
    assert "net_g.blocks.1.proj.proj.weight" in groups[0]["param_names"]


@pytest.mark.parametrize("first", ["published", "earlier version"])
def test_where_shapes_do_not_tell_it_is_who_saved_the_state(first: str, make_trained: Any) -> None:
    """Of these two parameters alone the shapes are the same."""
    network = {"exp_ratio": 1, "conv_blocks": 1}
    freeze = [f"*{name}*" for name in ("plk", "proj", "attn", "ln", "last", "to_img", "out", "dwc", "blocks.1")]
    trained = make_trained(network=network, freeze=freeze)
    assert len(entries_by_name(trained)) == 4
    again = make_trained(network=network, freeze=freeze, steps=0)
    resumed(FORMS[first](training_state(trained, 1, 2)), again)
    assert_same_states(again, trained)


@pytest.mark.parametrize("form", FORMS)
def test_states_with_a_discriminator(form: str, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_vgg19(monkeypatch)
    changes: dict[str, Any] = {"scale": 4, "model_type": "ESCRealGANModel"}
    changes |= {"network_g": {"type": "ESCReal", **SMALL}}
    changes |= {"network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4}}
    train: dict[str, Any] = {f"optim_{net}": {"type": "Adam", "lr": 1e-3} for net in "gd"}
    train |= {"scheduler": {"type": "MultiStepLR", "milestones": [3]}, "total_iter": 4}
    train |= {"pixel_opt": {"type": "L1Loss"}, "gan_opt": {"type": "GANLoss", "gan_type": "vanilla"}}
    train |= {"perceptual_opt": {"type": "PerceptualLoss", "layer_weights": {"conv1_2": 1}}}
    trained, again = (make_model(**changes, train=copy.deepcopy(train)) for _ in range(2))
    take_steps(trained, 2)
    state = training_state(trained, 1, 2)
    assert state["optimizers"][1]["param_groups"][0]["param_names"][0] == "net_d.conv0.weight"
    resumed(FORMS[form](state), again)
    assert_same_states(again, trained)


# --- states that do not fit -----------------------------------------------------------------------------------------


def refused(state: dict[str, Any], model: Any) -> str:
    """The message, having changed nothing."""
    before = copy.deepcopy([optimizer.state_dict() for optimizer in model.optimizers])
    with pytest.raises(UserError) as caught:
        resumed(state, model)
    assert [optimizer.state_dict() for optimizer in model.optimizers] == before
    text = str(caught.value)
    assert "\n" not in text and "does not fit the optimisers of the option file (" in text
    return text


@pytest.mark.parametrize("form", FORMS)
def test_shapes_that_do_not_fit_are_named_before_anything_is_applied(form: str, make_trained: Any) -> None:
    state = FORMS[form](training_state(make_trained(network={"window_size": 8}), 1, 2))
    text = refused(state, make_trained(steps=0))
    name = "net_g.blocks.0.attn.relative_position_bias"
    assert f"(optim_g: {name} is (2, 49), and its exp_avg (2, 225); {name} is (2, 49), and its exp_avg_sq" in text
    assert "; and 1 more)" in text


def test_other_parameters_are_named_where_the_state_has_names(make_trained: Any) -> None:
    state = training_state(make_trained(freeze=["proj.*"]), 1, 2)
    text = refused(state, make_trained(steps=0, freeze=["last.bias"]))
    assert "net_g.proj.bias is trained now and was not" in text and "net_g.last.bias was trained and is not now" in text
    plain = refused(without_names(state), make_trained(steps=0))
    assert "optim_g: it is of 99 parameter tensors, and the option file trains 101" in plain


def test_other_groups_of_the_same_parameters(make_trained: Any) -> None:
    state = training_state(make_trained(lr_factors={"proj.bias": 2}), 1, 2)
    text = refused(state, make_trained(steps=0, lr_factors={"last.bias": 2}))
    assert "optim_g: net_g.proj.bias is in another group; net_g.last.bias is in another group)" in text


TYPES = ["Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam", "Adamax", "Adafactor", "Adagrad"]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("saved", TYPES)
def test_another_type_of_optimiser_is_refused_by_name(saved: str, named: bool, make_trained: Any) -> None:
    state = training_state(make_trained(optim_g={"type": saved, "lr": 1e-3}), 1, 2)
    state = state if named else without_names(state)
    resumed(state, make_trained(steps=0, optim_g={"type": saved, "lr": 0.5}))
    for other in ("Adam", "AdamW", "SGD", "RAdam"):
        if other != saved:
            text = refused(state, make_trained(steps=0, optim_g={"type": other, "lr": 1e-3}))
            assert f"(train: optim_g: type is {other}, and the state was saved by {saved})" in text


@needs_muon
def test_muon_and_others_are_told_apart(make_trained: Any) -> None:
    muon, adam = ({"optim_g": {"type": kind, "lr": 1e-3}} for kind in ("Muon", "Adam"))
    for trained, other, message in (
        (muon, adam, "type is Adam, and the state was saved by Muon"),
        (adam, muon, "type is Muon, and the state was saved by Adam"),
    ):
        state = without_names(training_state(make_trained(**trained), 1, 2))
        assert message in refused(state, make_trained(steps=0, **other))


def test_types_that_are_not_pytorchs_are_told_apart_by_name(make_trained: Any) -> None:
    state = training_state(make_trained(), 1, 2)
    state["optimizers"][0]["type"] = "Lion"  # of which a rule with Adam's numbers could be
    assert "type is Adam, and the state was saved by Lion)" in refused(state, make_trained(steps=0))


def test_adamw_of_an_older_pytorch(make_trained: Any) -> None:
    """Its groups do not say that they are not Adam's."""
    train = {"optim_g": {"type": "AdamW", "lr": 1e-3}}
    trained, again = make_trained(**train), make_trained(steps=0, **train)
    state = without_names(training_state(trained, 1, 2))
    del state["optimizers"][0]["param_groups"][0]["decoupled_weight_decay"]
    resumed(state, again)
    assert_same_states(again, trained)


def test_a_resumed_run_with_another_optimiser_ends_with_one_line(run_basicsr: Any, train_options: Any) -> None:
    assert run_basicsr("train", train_options).status == 0
    train_options["train"] |= {"optim_g": {"type": "SGD", "lr": 1e-3}, "total_iter": 6}
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 2
    assert "type is SGD, and the state was saved by Adam" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(("kind", "factor"), [("ESC", 2), ("ESCRIB", 1)])
def test_moments_of_factors_of_earlier_versions(kind: str, factor: int, make_trained: Any) -> None:
    """Loading divides their q factors by sqrt(rank) = 2, so that gradients double; not ESC-RIB's."""
    network = {"attn_type": "FlashBias", "rank": 4}
    trained, again = (make_trained(kind, steps, network=network) for steps in (2, 0))
    resumed(in_earlier_order(training_state(trained, 1, 2)), again)
    expected, found = entries_by_name(trained), entries_by_name(again)
    for name, entry in expected.items():
        times = factor if name.endswith("flashbias_q") else 1
        assert torch.equal(found[name]["exp_avg"], entry["exp_avg"] * times), name
        assert torch.equal(found[name]["exp_avg_sq"], entry["exp_avg_sq"] * times**2), name
        assert torch.equal(found[name]["step"], entry["step"])
