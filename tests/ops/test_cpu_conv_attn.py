"""ConvAttn's C++ operators: against the formula in float64, and inside networks, compiled and recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_golden as golden
import torch
import torch.nn.functional as F
from networks import max_error, normal
from torch import Tensor

from esc_arch.modules import ConvAttn, fused
from esc_arch.ops.conv_attn import (
    conv_attention,
    conv_attention_fused,
    symmetrise,
)
from esc_arch.ops.conv_attn import cpu as operators
from esc_arch.ops.conv_attn.cpu import LARGEST_KERNEL

NAMES = ("output", "gradient of x", "gradient of the large kernel", "gradient of the dynamic kernel")
FORWARD_ONLY = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

pytestmark = pytest.mark.usefixtures("native")


def inputs(
    pdim: int, side: int, size: tuple[int, int], batch: int = 1, channels_last: bool = True, dynamic_side: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `pdim` channels of a wider map, as ConvAttn has them, a free large kernel and the dynamic one."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = normal(batch, pdim + 3, *size).contiguous(memory_format=layout)[:, :pdim]
    return x, normal(pdim, pdim, side, side, seed=3), normal(batch, pdim, dynamic_side, dynamic_side, seed=4)


def results(backend: str, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The output and the gradients; those of the large kernel through its symmetrisation, as in the networks."""
    x, large, dynamic = leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = conv_attention(x, symmetrise(large), dynamic, symmetric=True, backend=backend)
    cotangent = normal(*out.shape, seed=5).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_within_budget(*tensors: Tensor) -> None:
    """At most twice the error of the plain formula in float32, or of a few roundings of the largest number.

    (A map of one pixel is a single product to the plain formula, and still a whole transform here.)
    """
    exact = results("reference", torch.float64, *tensors)
    plain = results("reference", torch.float32, *tensors)
    ours = results("cpu", torch.float32, *tensors)
    for name, truth, formula, fast in zip(NAMES, exact, plain, ours, strict=True):
        rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert max_error(fast, truth) <= max(2 * max_error(formula, truth), rounding), name


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (2, 30), (70, 45)])
@pytest.mark.parametrize(("pdim", "side"), [(4, 3), (8, 5), (16, 13), (20, 7), (16, 15)])
def test_against_float64(pdim: int, side: int, size: tuple[int, int], channels_last: bool) -> None:
    assert_within_budget(*inputs(pdim, side, size, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("size", [(1, 7), (5, 6), (37, 40)])
def test_each_image_of_a_batch(size: tuple[int, int], batch: int, channels_last: bool) -> None:
    assert_within_budget(*inputs(16, 13, size, batch, channels_last))


@pytest.mark.parametrize("spoiled", [float("nan"), 1e12])
def test_an_image_does_not_see_the_others_of_its_batch(spoiled: float) -> None:
    x, large, dynamic = inputs(4, 5, (40, 30), 3)
    alone = conv_attention(x, symmetrise(large), dynamic, symmetric=True, backend="cpu")
    x[1] *= spoiled
    beside = conv_attention(x, symmetrise(large), dynamic, symmetric=True, backend="cpu")
    assert torch.equal(beside[::2], alone[::2])


@pytest.mark.parametrize(("side", "dynamic_side"), [(13, 1), (13, 5), (1, 3), (1, 1), (3, 7), (LARGEST_KERNEL, 3)])
def test_other_kernel_sizes(side: int, dynamic_side: int) -> None:
    assert_within_budget(*inputs(4, side, (40, 21), 2, dynamic_side=dynamic_side))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_to_the_bit_at_every_call(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (results("cpu", torch.float32, *inputs(16, 13, (50, 90), 2)) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_any_strides_and_no_input_modified() -> None:
    x, large, dynamic = normal(1, 8, 30, 44), symmetrise(normal(4, 4, 13, 13)), normal(2, 4, 3, 3)
    before = x.clone()
    view = x.expand(2, -1, -1, -1)[:, ::2, :, 1::2].transpose(2, 3)
    expected = conv_attention(view, large, dynamic, backend="reference")
    turned = dynamic.transpose(2, 3).contiguous().transpose(2, 3)
    assert max_error(conv_attention(view, large, turned, symmetric=True, backend="cpu"), expected) < 1e-4
    assert torch.equal(x, before)


def test_layout_of_the_input_is_kept() -> None:
    for channels_last in (True, False):
        tensors = inputs(4, 5, (6, 7), 2, channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for part in results("cpu", torch.float32, *tensors)[:2]:
            assert part.is_contiguous(memory_format=layout)


def test_only_the_gradients_asked_for() -> None:
    x, large, dynamic = inputs(4, 5, (9, 8), 2)
    large = symmetrise(large)
    for chosen in range(3):
        leaves = [value.detach().requires_grad_(i == chosen) for i, value in enumerate((x, large, dynamic))]
        out, expected = (
            torch.autograd.grad(
                conv_attention(*leaves, symmetric=True, backend=backend).square().sum(), leaves[chosen]
            )[0]
            for backend in ("cpu", "reference")
        )
        if chosen == 1:  # only the part that an even kernel can follow is promised
            out, expected = symmetrise(out), symmetrise(expected)
        assert max_error(out, expected) < 1e-5 * expected.abs().max().item()


def test_an_empty_batch() -> None:
    out, *gradients = results("cpu", torch.float32, *inputs(4, 5, (6, 7), batch=0))
    assert out.shape == (0, 4, 6, 7)
    assert [part.shape for part in gradients] == [(0, 4, 6, 7), (4, 4, 5, 5), (0, 4, 3, 3)]
    assert not gradients[1].any()


def test_a_kernel_that_is_not_symmetric_is_not_taken_for_one() -> None:
    x, large, dynamic = inputs(4, 5, (9, 8))
    with pytest.raises(RuntimeError, match=r"large_kernel is not symmetric.*Pass it through symmetrise, or call with"):
        conv_attention(x, large, dynamic, symmetric=True, backend="cpu")
    with pytest.raises(RuntimeError, match="large_kernel is not symmetric"):
        conv_attention(x, symmetrise(large).index_fill(3, torch.tensor([0]), float("nan")), dynamic, symmetric=True)


@pytest.mark.parametrize(
    ("tensors", "symmetric", "reason"),
    [
        (inputs(4, 5, (9, 8)), False, "needs a large kernel that is symmetric"),
        ([value.double() for value in inputs(4, 5, (9, 8))], True, r"takes float32, not torch\.float64"),
        ([value.to("meta") for value in inputs(4, 5, (9, 8))], True, "runs on cpu, not on meta"),
        (inputs(2, LARGEST_KERNEL + 2, (9, 8)), True, f"takes kernels of at most {LARGEST_KERNEL} x {LARGEST_KERNEL}"),
    ],
)
def test_what_the_operators_cannot_do(tensors: list[Tensor], symmetric: bool, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"ConvAttn backend cpu cannot run here. cpu: .*{reason}"):
        conv_attention(*tensors, symmetric=symmetric, backend="cpu")
    out = conv_attention(*tensors, symmetric=symmetric)
    assert out.shape == tensors[0].shape


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("dim", "pdim"), [(19, 16), (64, 16), (16, 16), (40, 5)])
def test_the_first_channels_of_a_map(dim: int, pdim: int, channels_last: bool) -> None:
    """The rest, and its gradient, pass as they are; the layout is kept."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = normal(2, dim, 21, 35).contiguous(memory_format=layout).requires_grad_()
    large = symmetrise(normal(pdim, pdim, 13, 13, seed=3)).requires_grad_()
    dynamic = normal(2, pdim, 3, 3, seed=4).requires_grad_()
    out = conv_attention(x, large, dynamic, symmetric=True)
    apart = conv_attention(x[:, :pdim], large, dynamic, symmetric=True, backend="cpu")
    assert torch.equal(out, torch.cat([apart, x[:, pdim:]], dim=1))
    assert out.is_contiguous(memory_format=layout)
    gradient = normal(*out.shape, seed=6).contiguous(memory_format=layout)
    found = torch.autograd.grad(out, (x, large, dynamic), gradient)
    of_apart = torch.autograd.grad(apart, (x, large, dynamic), gradient[:, :pdim])
    assert torch.equal(found[0], torch.cat([of_apart[0][:, :pdim], gradient[:, pdim:]], dim=1))
    assert all(torch.equal(one, other) for one, other in zip(found[1:], of_apart[1:], strict=True))


def step_inputs(dim: int, pdim: int, outputs: int, size: tuple[int, int], batch: int = 2) -> dict[str, Tensor | None]:
    layout = torch.channels_last
    hidden, taps = pdim // 2, 9 * pdim
    return {
        "x": normal(batch, dim, *size).contiguous(memory_format=layout),
        "residual": normal(batch, outputs, *size, seed=1).contiguous(memory_format=layout),
        "large_kernel": symmetrise(normal(pdim, pdim, 13, 13, seed=2)),
        "means": normal(batch, pdim, seed=3),
        "proj1_weight": normal(hidden, pdim, 1, 1, seed=4),
        "proj1_bias": normal(hidden, seed=5),
        "proj2_weight": normal(taps, hidden, 1, 1, seed=6),
        "proj2_bias": normal(taps, seed=7),
        "weight": normal(outputs, dim, 1, 1, seed=8),
        "bias": normal(outputs, seed=9),
    }


def step_formula(dtype: torch.dtype, values: dict[str, Tensor | None]) -> Tensor:
    v = {name: value if value is None else value.to(dtype) for name, value in values.items()}
    x, large_kernel, pdim = v["x"], v["large_kernel"], v["large_kernel"].shape[0]
    means = x[:, :pdim].mean((2, 3)) if v["means"] is None else v["means"]
    hidden = F.gelu(F.conv2d(means[:, :, None, None], v["proj1_weight"], v["proj1_bias"]))
    dynamic = F.conv2d(hidden, v["proj2_weight"], v["proj2_bias"]).reshape(-1, pdim, 3, 3)
    convolved = conv_attention(x[:, :pdim], large_kernel, dynamic, backend="reference")
    out = F.conv2d(torch.cat([convolved, x[:, pdim:]], dim=1), v["weight"], v["bias"])
    return out if v["residual"] is None else v["residual"] + out


def assert_step_within_budget(values: dict[str, Tensor | None]) -> None:
    out = conv_attention_fused(**values, symmetric=True)
    assert out is not None
    truth = step_formula(torch.float64, values)
    rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert max_error(out, truth) <= max(2 * max_error(step_formula(torch.float32, values), truth), rounding)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dim", "pdim", "outputs"), [(24, 16, 24), (64, 16, 64), (40, 20, 7), (5, 5, 90)])
@pytest.mark.parametrize("size", [(1, 1), (43, 55)])
def test_step_against_float64(dim: int, pdim: int, outputs: int, size: tuple[int, int]) -> None:
    assert_step_within_budget(step_inputs(dim, pdim, outputs, size))


@pytest.mark.parametrize("left_out", ["residual", "means", "proj1_bias", "proj2_bias", "bias"])
def test_step_without(left_out: str) -> None:
    assert_step_within_budget({**step_inputs(24, 16, 24, (9, 38), batch=3), left_out: None})


def test_step_with_maps_that_are_parts_of_others() -> None:
    values = step_inputs(24, 16, 20, (9, 38))
    for name in ("x", "residual"):
        wider = torch.cat([values[name], values[name]], dim=1).contiguous(memory_format=torch.channels_last)
        values[name] = wider[:, : values[name].shape[1], 1:, ::2]
    values["means"] = values["means"].t().contiguous().t()
    assert_step_within_budget(values)


def test_step_of_an_empty_batch() -> None:
    assert conv_attention_fused(**step_inputs(24, 16, 20, (9, 8), batch=0), symmetric=True).shape == (0, 20, 9, 8)


@pytest.mark.parametrize("spoiled", ["x", "residual", "means", "proj1_weight", "proj2_bias", "weight", "bias"])
def test_step_lets_nan_through(spoiled: str) -> None:
    values = step_inputs(24, 16, 24, (5, 6))
    values[spoiled] = torch.full_like(values[spoiled], float("nan"))
    assert conv_attention_fused(**values, symmetric=True).isnan().all()


def test_where_steps_are_left_to_others() -> None:
    values = step_inputs(24, 16, 24, (9, 8))

    def runs(symmetric: bool = True, **changed: Tensor | None) -> bool:
        return conv_attention_fused(**{**values, **changed}, symmetric=symmetric) is not None

    assert runs()
    assert not runs(symmetric=False)
    assert not runs(x=values["x"].contiguous())
    assert not runs(residual=values["residual"].contiguous())
    assert not runs(means=values["means"].double())
    assert not runs(proj1_bias=values["proj1_bias"].to("meta"))
    assert not runs(bias=values["bias"].clone().requires_grad_())  # the means might need a gradient, too
    assert runs(bias=values["bias"].clone().requires_grad_(), means=None)
    with torch.no_grad():
        assert runs(bias=values["bias"].clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("means", normal(2, 15), r"the means do not fit x of shape \[2, 24, 5, 6\]"),
        ("proj1_weight", normal(8, 15, 1, 1), r"a projection of shape \[8, 15, 1, 1\] where 8 x 16 x 1 x 1"),
        ("proj2_bias", normal(16), "a projection of shape .* where 144 x 8 x 1 x 1, and a bias to it, are needed"),
        ("residual", normal(2, 24, 6, 5).contiguous(memory_format=torch.channels_last), "must be as the output"),
        ("weight", normal(24, 23, 1, 1), r"a weight of shape \[24, 23, 1, 1\] does not fit x"),
    ],
)
def test_step_says_what_does_not_fit(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        conv_attention_fused(**{**step_inputs(24, 16, 24, (5, 6)), name: value}, symmetric=True)


def test_step_with_a_kernel_that_is_not_symmetric() -> None:
    values = step_inputs(24, 16, 24, (5, 6))
    with pytest.raises(RuntimeError, match="large_kernel is not symmetric"):
        conv_attention_fused(**{**values, "large_kernel": normal(16, 16, 13, 13)}, symmetric=True)


@pytest.mark.parametrize("given", ["means", None])
def test_step_does_not_depend_on_the_number_of_threads(given: str | None) -> None:
    values, before, outputs = step_inputs(64, 16, 64, (80, 90), batch=1), torch.get_num_threads(), []
    values["means"] = values["means"] if given else None
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(conv_attention_fused(**values, symmetric=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_step_compiled() -> None:
    values = step_inputs(24, 16, 24, (9, 8))

    def step(values: dict[str, Tensor | None]) -> Tensor | None:
        return conv_attention_fused(**values, symmetric=True)

    out = torch.compile(step, backend="aot_eager", fullgraph=True)(values)
    assert torch.equal(out, step(values))


# --- with gradients -------------------------------------------------------------------------------------------------


def layer_inputs(dim: int, pdim: int, outputs: int, size: tuple[int, int], batch: int = 2) -> dict[str, Tensor | None]:
    """As a training has them: the means are those of x, and the large kernel is free still."""
    values = step_inputs(dim, pdim, outputs, size, batch)
    return {**values, "means": None, "large_kernel": normal(pdim, pdim, 13, 13, seed=2)}


def layer_results(
    dtype: torch.dtype | None, values: dict[str, Tensor | None], frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The output and all gradients, by the formula in a type, or, for None, by the operator."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(name not in frozen)
        for name, value in values.items()
        if value is not None
    }
    given = {**values, **leaves, "large_kernel": symmetrise(leaves["large_kernel"])}
    out = conv_attention_fused(**given, symmetric=True) if dtype is None else step_formula(dtype, given)
    assert out is not None
    wanted = [name for name in leaves if name not in frozen]
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], normal(*out.shape, seed=10).to(out.dtype))
    return {"output": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_layer_within_budget(values: dict[str, Tensor | None], frozen: tuple[str, ...] = ()) -> None:
    """As `assert_within_budget`: at most twice the plain formula's error, or a few roundings."""
    exact, plain, ours = (layer_results(dtype, values, frozen) for dtype in (torch.float64, torch.float32, None))
    assert exact.keys() == ours.keys()
    for name, truth in exact.items():
        rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert ours[name].shape == truth.shape, name
        assert max_error(ours[name], truth) <= max(2 * max_error(plain[name], truth), rounding), name


@pytest.mark.parametrize(("dim", "pdim", "outputs"), [(24, 16, 24), (64, 16, 64), (40, 20, 7), (5, 5, 90)])
@pytest.mark.parametrize("size", [(1, 1), (43, 55)])
def test_layer_against_float64(dim: int, pdim: int, outputs: int, size: tuple[int, int]) -> None:
    assert_layer_within_budget(layer_inputs(dim, pdim, outputs, size))


@pytest.mark.parametrize("left_out", ["residual", "proj1_bias", "proj2_bias", "bias"])
def test_layer_without(left_out: str) -> None:
    assert_layer_within_budget({**layer_inputs(24, 16, 24, (9, 38), batch=3), left_out: None})


@pytest.mark.parametrize(
    "frozen",
    [
        ("x",),
        ("residual", "x", "large_kernel"),
        ("large_kernel", "proj1_weight", "proj1_bias", "proj2_weight", "proj2_bias", "weight", "bias"),
    ],
)
def test_layer_with_only_the_gradients_asked_for(frozen: tuple[str, ...]) -> None:
    assert_layer_within_budget(layer_inputs(24, 16, 24, (20, 31)), frozen)


def test_layer_with_maps_that_are_parts_of_others() -> None:
    values = layer_inputs(24, 16, 20, (9, 38))
    for name in ("x", "residual"):
        wider = torch.cat([values[name], values[name]], dim=1).contiguous(memory_format=torch.channels_last)
        values[name] = wider[:, : values[name].shape[1], 1:, ::2]
    assert_layer_within_budget(values)


def test_layer_of_an_empty_batch() -> None:
    values = layer_inputs(24, 16, 20, (9, 8), batch=0)
    found = layer_results(None, values)
    assert found.pop("output").shape == (0, 20, 9, 8)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in values.items() if value is not None
    }
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_layer_gives_the_same_bits_at_every_call(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (layer_results(None, layer_inputs(64, 16, 64, (50, 90))) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layer_modifies_no_input() -> None:
    values = layer_inputs(24, 16, 24, (9, 38))
    copies = {name: value.clone() for name, value in values.items() if value is not None}
    layer_results(None, values)
    assert all(torch.equal(values[name], copy) for name, copy in copies.items())


def test_second_derivatives_of_a_layer_are_refused() -> None:
    values = layer_inputs(24, 16, 24, (9, 8))
    x = values["x"].requires_grad_()
    out = conv_attention_fused(**{**values, "large_kernel": symmetrise(values["large_kernel"])}, symmetric=True)
    with pytest.raises(RuntimeError, match="no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("hooked", ["aggr", "plk", "plk.dwc_proj.1"])
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_within_that_has_a_hook_is_called(hooked: str, train: bool) -> None:
    layer, calls = ConvAttn(dim=20, pdim=16, own_kernel=True).requires_grad_(train), []
    x = normal(1, 20, 9, 8).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    layer.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(hooked))
    assert max_error(layer(x), expected) < 1e-5
    assert calls == [hooked]


def calls_of_operators(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x that reach the operators from now on, for both convolutions or the whole layer."""
    shapes: list[tuple[int, ...]] = []

    def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *others: object, **options: object) -> Tensor:
            out = forward(x, *others, **options)
            if out is not None:
                shapes.append(tuple(x.shape))
            return out

        return call

    for module, name in ((operators, "forward"), (fused, "conv_attention_fused")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return shapes


@pytest.mark.parametrize("name", golden.TRAINED_FILES)
def test_recorded_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_operators(monkeypatch)
    net = golden.golden_net(name, "naive").train()
    output = net(golden.tensors(name)["train.input"])
    assert max_error(output, golden.tensors(name)["train.output"]) < golden.TOLERANCE
    assert bool(calls) == (golden.MANIFEST[name]["type"] != "ESCFP")  # whose ConvAttn is another one
    F.l1_loss(output, golden.tensors(name)["train.target"]).backward()
    gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
    expected = golden.part(name, "grad.")
    assert max(max_error(gradients[key], expected[key]) for key in expected) < golden.TOLERANCE


@pytest.mark.parametrize("name", ["esc_x2", "esc_rib_x2"])
def test_recorded_networks_without_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_operators(monkeypatch)
    net = golden.golden_net(name, "naive").to(memory_format=torch.channels_last)
    with torch.no_grad():
        output = net(golden.tensors(name)["input"].contiguous(memory_format=torch.channels_last))
    assert max_error(output, golden.tensors(name)["output"]) < golden.TOLERANCE
    assert len(calls) == sum(isinstance(module, ConvAttn) for module in net.modules())


def test_conv_attn_with_a_kernel_of_unknown_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_operators(monkeypatch)
    x, kernel = normal(1, 6, 9, 8), normal(4, 4, 5, 5)
    ConvAttn(dim=6, pdim=4, kernel_size=5)(x, kernel)
    assert calls == []
    ConvAttn(dim=6, pdim=4, kernel_size=5, symmetric=True)(x, symmetrise(kernel))
    ConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True)(x)
    assert calls == [(1, 6, 9, 8)] * 2


def test_the_operators_are_registered_as_pytorch_wants() -> None:
    x, large, dynamic = inputs(4, 5, (9, 8), 2)
    leaves = [value.detach().requires_grad_() for value in (x, symmetrise(large), dynamic)]
    torch.library.opcheck(torch.ops.esc_arch.conv_attention_cpu.default, leaves)
    step = torch.ops.esc_arch.conv_attention_fused_cpu.default
    torch.library.opcheck(step, tuple(step_inputs(24, 16, 20, (9, 8)).values()), test_utils=FORWARD_ONLY)
    values = layer_inputs(24, 16, 20, (9, 8)) | {"large_kernel": symmetrise(normal(16, 16, 13, 13))}
    del values["means"]
    layer = tuple(value.requires_grad_() for value in values.values())
    torch.library.opcheck(torch.ops.esc_arch.conv_attention_fused_training_cpu.default, layer)
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (normal(*x.shape, seed=6), x, symmetrise(large), dynamic, *wanted)
        operator = torch.ops.esc_arch.conv_attention_backward_cpu.default
        torch.library.opcheck(operator, arguments, test_utils=FORWARD_ONLY)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = normal(2, 6, 9, 8)
    gradients = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert any("conv_attention" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    for eager, traced in zip(*gradients, strict=True):
        assert max_error(traced, eager) < 1e-5 * max(1.0, eager.abs().max().item())


def test_compiled_without_gradient() -> None:
    layer = ConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = normal(2, 6, 9, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert max_error(out, layer(x)) < 1e-5 * out.abs().max().item()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:", "ignore::torch.jit.TracerWarning")
def test_an_exported_layer_keeps_the_plain_formula() -> None:
    layer = ConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True).eval()
    x = normal(1, 6, 9, 8)
    exported = torch.export.export(layer, (x,))
    traced = torch.jit.trace(layer, x)
    assert "ops.esc_arch" not in exported.graph_module.code
    assert "esc_arch::" not in str(traced.inlined_graph)
    assert max_error(exported.module()(x), layer(x)) < 1e-5


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kernel_that_is_no_number_any_more_is_no_mistake_of_the_caller(value: float) -> None:
    """A training whose weights are spoiled has to get as far as the loss, which says so."""
    x, large, dynamic = torch.ones(1, 16, 8, 8), torch.full((16, 16, 13, 13), value), torch.zeros(1, 16, 3, 3)
    assert not conv_attention(x, large, dynamic, symmetric=True, backend="cpu").isfinite().any()
