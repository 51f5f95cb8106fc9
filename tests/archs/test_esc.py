"""The ESC network: names, sizes, layouts, copies, compilers, folding and checkpoints of another scale."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.models.base_model import BaseModel
from networks import (
    BACKENDS,
    SIZES,
    SMALL,
    TRAINABLE,
    average_of_symmetries,
    image,
    max_error,
    needs_compiler,
    reference_esc,
    small_esc,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from esc_arch import ESC
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.ops.window_attention import flex

# --- names and counts ----------------------------------------------------------------------------------------------

LIGHT = {"n_blocks": 3}
XL = {"dim": 192, "pdim": 48, "n_blocks": 8, "window_size": 48, "num_heads": 12, "use_ln": True}


@pytest.mark.parametrize(
    ("options", "scale", "count"),
    [
        ({}, 2, 946_728),
        ({}, 3, 955_383),
        ({}, 4, 967_500),
        (LIGHT, 2, 603_600),
        (LIGHT, 3, 612_255),
        (LIGHT, 4, 624_372),
        (XL, 2, 12_455_916),
    ],
)
def test_number_of_parameters(options: dict[str, Any], scale: int, count: int) -> None:
    net = ESC(**options, upscaling_factor=scale)  # the defaults are the base network's
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("use_ln", [False, True])
def test_names_and_shapes_of_the_parameters(use_ln: bool) -> None:
    dim, pdim, side, hidden, window, heads, scale = 16, 4, 13, 20, 8, 2, 3
    expected: dict[str, tuple[int, ...]] = {"plk_filter": (pdim, pdim, side, side)}

    def conv(name: str, *shape: int) -> None:
        expected[f"{name}.weight"], expected[f"{name}.bias"] = shape, shape[:1]

    def conv_ffn(name: str, hidden: int) -> None:
        conv(f"{name}.proj", hidden, dim, 1, 1)
        conv(f"{name}.dwc", hidden, 1, 3, 3)
        conv(f"{name}.aggr", dim, hidden, 1, 1)

    conv("proj", dim, 3, 3, 3)
    conv("last", dim, dim, 3, 3)
    conv("to_img", 3 * scale**2, dim, 3, 3)
    for block in ("blocks.0", "blocks.1"):
        for norm in ("ln_proj", "ln_attn", "ln_out"):
            conv(f"{block}.{norm}", dim)
        conv_ffn(f"{block}.proj", 2 * dim)
        expected[f"{block}.attn.relative_position_bias"] = (heads, (2 * window - 1) ** 2)
        conv(f"{block}.attn.to_qkv", 3 * dim, dim, 1, 1)
        conv(f"{block}.attn.to_out", dim, dim, 1, 1)
        for pair in range(3):
            conv_ffn(f"{block}.convffns.{pair}", hidden)
            conv(f"{block}.pconvs.{pair}.plk.dwc_proj.1", pdim // 2, pdim, 1, 1)
            conv(f"{block}.pconvs.{pair}.plk.dwc_proj.3", 9 * pdim, pdim // 2, 1, 1)
            conv(f"{block}.pconvs.{pair}.aggr", dim, dim, 1, 1)
            if use_ln:
                conv(f"{block}.lns.{pair}", dim)
        conv(f"{block}.conv_out", dim, dim, 3, 3)
    net = small_esc(n_blocks=2, conv_blocks=3, upscaling_factor=scale, use_ln=use_ln)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == expected
    assert {name for name, _ in net.named_parameters()} == expected.keys()  # none of them a buffer
    assert list(net.buffers()) == []
    assert {name.split(".")[-1] for name in expected} == {"weight", "bias", "plk_filter", "relative_position_bias"}


def test_names_do_not_depend_on_the_backend() -> None:
    assert len({tuple(small_esc(attn_type=name).state_dict()) for name in ("auto", "Naive", "SDPA", "Flex")}) == 1


def test_initial_values() -> None:
    """Those of the layers are tested there; here that blocks have values of their own."""
    net = ESC(**SMALL | {"n_blocks": 2})
    rows = net.plk_filter.detach().double().flatten(1)
    assert max_error(rows @ rows.T, torch.eye(SMALL["pdim"])) < 1e-5
    assert not torch.equal(*(block.attn.relative_position_bias for block in net.blocks))
    assert not any(pconv.plk.dwc_proj[3].weight.any() for block in net.blocks for pconv in block.pconvs)


# --- compilers -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_flex_is_compiled_once_for_all_sizes_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single window is a second case, anything else is not. What is traced is counted; other tests generate code."""
    torch._dynamo.reset()
    counters.clear()
    traced = torch.compile(flex._attend, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: traced)
    net = small_esc(attn_type="flex", n_blocks=2, conv_blocks=1)
    networks = [net, copy.deepcopy(net), small_esc(seed=7, attn_type="flex", conv_blocks=1)]
    batches = [(1, (9, 10)), *((batch, size) for size in SIZES for batch in (1, 2))]
    with torch.no_grad():
        for batch, size in batches:
            for each in networks:
                each(image(batch, 3, *size))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@needs_compiler
def test_torch_compile() -> None:
    """Expensive, some 10 s. Flex attention, which costs as much again, is tried as a layer by itself."""
    net = small_esc(conv_blocks=1)
    compiled = torch.compile(net, fullgraph=True)
    x = image(1, 3, 13, 21)
    with torch.no_grad():
        assert max_error(compiled(x), net(x)) < 1e-5


@pytest.mark.parametrize("backend", ["auto", *TRAINABLE])
def test_torch_export_with_dynamic_sizes(backend: str) -> None:
    net = small_esc(attn_type=backend, conv_blocks=1)
    varying = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(net, (image(2, 3, 9, 11),), dynamic_shapes=(varying,)).module()
    for batch in (1, 3):
        for size in SIZES:
            x = image(batch, 3, *size)
            with torch.no_grad():
                assert max_error(program(x), net(x)) < 1e-5, (batch, size)


def test_flex_cannot_be_exported() -> None:
    net = small_esc(attn_type="flex", conv_blocks=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="a compiled kernel cannot be exported"):
        torch.export.export(net, (image(2, 3, 9, 11),))


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_any_size_of_image(backend: str, size: tuple[int, int]) -> None:
    """In float64, where a GELU by tanh or a padding by something else than reflection cannot hide."""
    net = small_esc(attn_type=backend).double()
    x = image(2, 3, *size, dtype=torch.float64)
    assert max_error(net(x), reference_esc(net.state_dict(), x, window=8, heads=2, scale=2)) < 1e-11


@pytest.mark.parametrize(
    "changes",
    [
        {"upscaling_factor": 1},
        {"upscaling_factor": 3},
        {"upscaling_factor": 5},
        {"use_ln": True},
        {"n_blocks": 2, "conv_blocks": 1},
        {"conv_blocks": 0},
        {"pdim": 16},
        {"pdim": 3, "kernel_size": 7},
        {"num_heads": 4, "window_size": 5},
        {"exp_ratio": 2},
    ],
    ids=str,
)
def test_options_change_what_they_say(changes: dict[str, Any]) -> None:
    net = small_esc(**changes).double()
    options = SMALL | changes
    x = image(1, 3, 9, 11, dtype=torch.float64)
    sizes = {"window": options["window_size"], "heads": options["num_heads"], "scale": options["upscaling_factor"]}
    assert max_error(net(x), reference_esc(net.state_dict(), x, **sizes)) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_in_both_modes_for_each_of_a_batch_and_for_any_layout(backend: str) -> None:
    net = small_esc(attn_type=backend)
    x = image(3, 3, 13, 21)
    before, version = x.clone(), x._version
    with torch.no_grad():
        expected = net(x)
        assert max_error(net.train()(x), expected) < 1e-6
        assert max_error(torch.cat([net(one[None]) for one in x]), expected) < 1e-5
        assert max_error(net(x.flip(0)).flip(0), expected) < 1e-5
        wide = torch.cat([x, 1 - x, x], dim=3)
        layouts = {
            "channels last": x.contiguous(memory_format=torch.channels_last),
            "part of a wider image": wide[..., 42:],
            "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
            "one image for all": x[:1].expand(3, -1, -1, -1),
        }
        for name, value in layouts.items():
            reference = expected[:1].expand_as(expected) if name == "one image for all" else expected
            assert max_error(net(value), reference) < 1e-5, name
        assert torch.equal(wide[..., 42:], before)
    assert torch.equal(x, before)
    assert x._version == version


@pytest.mark.parametrize("backend", TRAINABLE)
def test_training_step_leaves_the_input_alone_and_reaches_every_parameter(backend: str) -> None:
    net = small_esc(attn_type=backend, use_ln=True).train()
    x = image(2, 3, 9, 11)
    before, version = x.clone(), x._version
    net(x).square().sum().backward()
    assert torch.equal(x, before)
    assert x._version == version
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_gradient_of_the_large_kernel_is_symmetric() -> None:
    net = small_esc().double()
    net(image(1, 3, 20, 27, dtype=torch.float64)).square().sum().backward()
    gradient = net.plk_filter.grad
    assert gradient.abs().max() > 0
    assert max_error(average_of_symmetries(gradient), gradient) < 1e-12 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", TRAINABLE)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    """The error is at most twice that of the plainest computation in the same precision, both against float64."""
    x = image(1, 3, 13, 21)
    expected = small_esc().double()(x.double())
    outputs = {name: small_esc(attn_type=name).to(dtype)(x.to(dtype)) for name in ("naive", backend)}
    assert outputs[backend].dtype == dtype
    errors = {name: max_error(output, expected) for name, output in outputs.items()}
    ulp = torch.finfo(dtype).eps * expected.abs().max()
    assert errors[backend] <= 2 * errors["naive"] + 4 * ulp
    assert errors["naive"] < 64 * ulp


@pytest.mark.parametrize("backend", TRAINABLE)
def test_autocast(backend: str) -> None:
    net = small_esc(attn_type=backend)
    x = image(1, 3, 13, 21)
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(x)
        output.float().sum().backward()
    assert 0 < max_error(output, expected) < 64 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_deep_copy_is_independent(backend: str) -> None:
    net, other = small_esc(attn_type=backend), small_esc(seed=7, attn_type="naive")
    x = image(1, 3, 20, 27)
    with torch.no_grad():
        expected = net(x)
        twin = copy.deepcopy(net)
        net.load_state_dict(other.state_dict())
        assert torch.equal(twin(x), expected)
        assert max_error(net(x), other(x)) < 1e-5
        assert max_error(net(x), expected) > 0.01
        table = "blocks.0.attn.relative_position_bias"  # and the table by itself: it is what closures used to keep
        twin.load_state_dict({table: -twin.state_dict()[table]}, strict=False)
        negated = small_esc(attn_type="naive")
        negated.load_state_dict(twin.state_dict())
        assert max_error(twin(x), negated(x)) < 1e-5
        assert max_error(twin(x), expected) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_average_of_basicsr(backend: str) -> None:
    net, average = small_esc(attn_type=backend), small_esc(seed=7, attn_type=backend)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = small_esc(attn_type="naive")
    expected.load_state_dict({name: 0.75 * value + 0.25 * before[name] for name, value in average.state_dict().items()})
    x = image(1, 3, 20, 27)
    with torch.no_grad():
        output = net(x)
        average(x)  # so that anything kept from a call is there
        holder = SimpleNamespace(net_g=net, net_g_ema=average, get_bare_model=lambda wrapped: wrapped)
        BaseModel.model_ema(holder, decay=0.75)
        assert max_error(average(x), expected(x)) < 1e-5
        assert torch.equal(net(x), output)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pickle(backend: str) -> None:
    net = small_esc(attn_type=backend)
    x = image(1, 3, 20, 27)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        # A network saved whole is code by nature; this one was written two lines above
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["Naive", "SDPA", "Flex", "naive", "sdpa", "flex", "auto", "AUTO"])
def test_spellings_of_the_backends(spelling: str) -> None:
    assert small_esc(attn_type=spelling).blocks[0].attn.attn_type == spelling.lower()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_type": "Fast"}, "attn_type 'Fast' is not known; allowed: auto, naive, sdpa, flex"),
        ({"attn_type": None}, "attn_type None is not known"),
        ({"num_heads": 3}, "num_heads is 3; it must divide dim = 16"),
        ({"num_heads": 0}, "num_heads is 0; it must divide dim = 16"),
        ({"kernel_size": 12}, "kernel_size is 12; it must be odd and at least 1"),
        ({"kernel_size": -1}, "kernel_size is -1; it must be odd and at least 1"),
        ({"pdim": 1}, "pdim is 1; it must be between 2 and dim = 16"),
        ({"pdim": 17}, "pdim is 17; it must be between 2 and dim = 16"),
        ({"upscaling_factor": 0}, "upscaling_factor is 0; it must be a whole number of at least 1"),
        ({"upscaling_factor": -2}, "upscaling_factor is -2; it must be a whole number of at least 1"),
        ({"upscaling_factor": 2.5}, "upscaling_factor is 2.5; it must be a whole number of at least 1"),
        ({"upscaling_factor": float("inf")}, "upscaling_factor is inf; it must be a whole number of at least 1"),
        ({"n_blocks": 10**9}, "n_blocks is 1000000000; it must be a whole number from 0 to 1000"),
        ({"n_blocks": 2.5}, "n_blocks is 2.5; it must be a whole number from 0 to 1000"),
        ({"conv_blocks": -1}, "conv_blocks is -1; it must be a whole number from 0 to 1000"),
        ({"window_size": 0}, "window_size is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_invalid_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ESC(**SMALL | changes)


def test_whole_upscaling_factor_may_be_a_float() -> None:
    assert small_esc(upscaling_factor=2.0)(image(1, 3, 4, 5)).shape == (1, 3, 8, 10)


def test_unknown_option_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="window_sise"):
        ESC(window_sise=8)


# --- folding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fold", "convert"])
def test_folding_once_and_twice_changes_no_output(name: str) -> None:
    net = small_esc(n_blocks=2)
    x = image(2, 3, 13, 21)
    free, effective = net.plk_filter.detach().clone(), symmetrise(net.plk_filter).detach()
    with torch.no_grad():
        expected = net(x)
        assert getattr(net, name)() is net
        assert torch.equal(net.plk_filter, effective)
        assert not torch.equal(net.plk_filter, free)
        assert max_error(net(x), expected) <= 1e-6
        getattr(net, name)()
        assert torch.equal(net.plk_filter, effective)
        assert max_error(net(x), expected) <= 1e-6
    assert isinstance(net.plk_filter, nn.Parameter)
    assert net.plk_filter.requires_grad


# --- checkpoints of another scale ----------------------------------------------------------------------------------


def interpolated(tensor: Tensor, scale: int) -> Tensor:
    """Bilinear interpolation over the sub-pixels (align_corners false), a number at a time."""
    source = tensor.detach().double().numpy()
    old = math.isqrt(len(source) // 3)
    result = np.zeros((3 * scale**2, *source.shape[1:]))

    def neighbours(place: int) -> list[tuple[int, float]]:
        position = max((place + 0.5) * old / scale - 0.5, 0)
        low = int(position)
        share = position - low
        return [(low, 1 - share), (min(low + 1, old - 1), share)]

    for colour in range(3):
        for i in range(scale):
            for j in range(scale):
                for y, share_y in neighbours(i):
                    for x, share_x in neighbours(j):
                        value = source[colour * old**2 + y * old + x]
                        result[colour * scale**2 + i * scale + j] += share_y * share_x * value
    return torch.from_numpy(result)


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.name == "basicsr" and r.levelno >= logging.WARNING]


@pytest.mark.parametrize(("source", "target"), [(2, 3), (2, 4), (4, 2), (3, 2), (1, 2), (2, 1)])
def test_checkpoint_of_another_scale(source: int, target: int, basicsr_log: pytest.LogCaptureFixture) -> None:
    state = small_esc(seed=7, upscaling_factor=source).state_dict()
    given = OrderedDict((name, value.clone()) for name, value in state.items())
    before = dict(given)
    net = small_esc(upscaling_factor=target)
    result = net.load_state_dict(given)
    assert result.missing_keys == result.unexpected_keys == []
    for name, value in net.state_dict().items():
        if name.startswith("to_img."):
            assert max_error(value, interpolated(state[name], target)) < 1e-6, name
        else:
            assert torch.equal(value, state[name]), name
    for kind in ("weight", "bias"):
        note = f"another scale: to_img.{kind} was interpolated from x{source} to x{target}"
        assert sum(note in text for text in warnings_in(basicsr_log)) == 1
    assert len(warnings_in(basicsr_log)) == 2
    assert given.keys() == before.keys()  # the caller's dictionary is as it was: the same tensors of the same values
    assert all(given[name] is before[name] and torch.equal(given[name], state[name]) for name in before)


@pytest.mark.parametrize("scale", [2, 4])
def test_checkpoint_of_the_same_scale_logs_nothing(scale: int, basicsr_log: pytest.LogCaptureFixture) -> None:
    state = small_esc(seed=7, upscaling_factor=scale).state_dict()
    net = small_esc(upscaling_factor=scale)
    net.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert warnings_in(basicsr_log) == []


def test_checkpoint_of_another_scale_for_a_network_inside_another() -> None:
    state = small_esc(seed=7).state_dict()
    wrapper = nn.ModuleDict({"teacher": small_esc(upscaling_factor=4)})
    wrapper.load_state_dict({f"teacher.{name}": value for name, value in state.items()})
    assert max_error(wrapper["teacher"].to_img.weight, interpolated(state["to_img.weight"], 4)) < 1e-6


def test_renamed_keys_are_recovered(basicsr_log: pytest.LogCaptureFixture) -> None:
    """BasicSR's loading with `strict_load_g: false` renames what does not fit, so that it would be left out."""
    state = small_esc(seed=7).state_dict()
    net = small_esc(upscaling_factor=4)
    renamed = {name + ".ignore" * name.startswith("to_img"): value for name, value in state.items()}
    net.load_state_dict(renamed, strict=True)
    for kind in ("weight", "bias"):
        assert max_error(getattr(net.to_img, kind), interpolated(state[f"to_img.{kind}"], 4)) < 1e-6
    assert len(warnings_in(basicsr_log)) == 2
    assert "to_img.weight.ignore" in renamed


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_of_another_scale_through_basicsr(
    strict: bool, tmp_path: Path, basicsr_log: pytest.LogCaptureFixture
) -> None:
    source = small_esc(seed=7)
    torch.save({"params": small_esc(seed=8).state_dict(), "params_ema": source.state_dict()}, tmp_path / "net_x2.pth")
    net = small_esc(upscaling_factor=4)
    model = BaseModel({"num_gpu": 0, "is_train": False, "dist": False})
    model.load_network(net, str(tmp_path / "net_x2.pth"), strict=strict, param_key="params_ema")
    for name, value in net.state_dict().items():
        value_there = source.state_dict()[name]
        expected = interpolated(value_there, 4) if name.startswith("to_img") else value_there
        assert max_error(value, expected) < 1e-6, name
    assert "interpolated from x2 to x4" in basicsr_log.text


def test_channels_that_are_no_subpixels_are_left_to_the_loading_to_report() -> None:
    state = small_esc().state_dict()
    state["to_img.weight"] = torch.zeros(7, 16, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for to_img\.weight"):
        small_esc().load_state_dict(state)


def test_adapt_state_dict_tells_what_it_did() -> None:
    state = dict(small_esc().state_dict())
    assert small_esc().adapt_state_dict(state) == []
    notes = small_esc(upscaling_factor=3).adapt_state_dict(state)
    assert notes == [f"another scale: to_img.{kind} was interpolated from x2 to x3." for kind in ("weight", "bias")]
    assert state["to_img.weight"].shape == (27, 16, 3, 3)
    assert state["to_img.bias"].shape == (27,)
