"""The C++ depth-wise convolution with filters of each image's own: against the formula in float64, and in ESC-FP."""

from __future__ import annotations

import pytest
import torch
from networks import max_error, normal
from torch import Tensor

from esc_arch.modules import DecomposedConvAttn
from esc_arch.ops.conv_attn import cpu, decomposed_conv_attention, reference
from esc_arch.ops.cpu import input_reasons

NAMES = ("output", "gradient of x", "gradient of the kernel")
FORWARD_ONLY = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

pytestmark = pytest.mark.usefixtures("native")


def inputs(batch: int, channels: int, size: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    x = normal(batch, channels + 3, *size).contiguous(memory_format=torch.channels_last)[:, :channels]
    return x, normal(batch, channels, side, side, seed=3)


def results(function: object, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=5).to(dtype))]


def assert_within_budget(x: Tensor, kernel: Tensor) -> None:
    """At most twice the error of the plain formula in float32, or of a few roundings of the largest number."""
    assert input_reasons(x, kernel) == []
    exact = results(reference.per_image_depthwise, torch.float64, x, kernel)
    plain = results(reference.per_image_depthwise, torch.float32, x, kernel)
    ours = results(cpu.per_image_depthwise, torch.float32, x, kernel)
    for name, truth, formula, fast in zip(NAMES, exact, plain, ours, strict=True):
        rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert max_error(fast, truth) <= max(2 * max_error(formula, truth), rounding), name


@pytest.mark.parametrize("size", [(1, 1), (2, 30), (33, 65), (70, 45)])
@pytest.mark.parametrize(("channels", "side"), [(16, 13), (1, 3), (20, 7), (5, 9), (16, 1), (3, 17)])
def test_against_float64(channels: int, side: int, size: tuple[int, int]) -> None:
    assert_within_budget(*inputs(2, channels, size, side))


def test_several_tiles_of_each_image_of_a_batch() -> None:
    assert_within_budget(*inputs(3, 18, (71, 130), 5))


def test_any_strides_and_no_input_modified() -> None:
    x, kernel = normal(1, 8, 30, 44), normal(2, 4, 3, 3).transpose(2, 3)
    before = x.clone()
    assert_within_budget(x.expand(2, -1, -1, -1)[:, ::2, :, 1::2].transpose(2, 3), kernel)
    assert_within_budget(normal(2, 4, 9, 10), kernel)
    assert torch.equal(x, before)


@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_goes_through_in_its_own_image(spoiled: int) -> None:
    tensors = inputs(2, 16, (20, 30), 5)
    alone = results(cpu.per_image_depthwise, torch.float32, *tensors)
    tensors[spoiled][1] = float("nan")
    beside = results(cpu.per_image_depthwise, torch.float32, *tensors)
    assert beside[0][1].isnan().all()
    assert beside[2 - spoiled][1].isnan().all()
    assert all(torch.equal(one[0], other[0]) for one, other in zip(alone, beside, strict=True))


def test_an_empty_batch() -> None:
    shapes = [tuple(part.shape) for part in results(cpu.per_image_depthwise, torch.float32, *inputs(0, 4, (6, 7), 5))]
    assert shapes == [(0, 4, 6, 7), (0, 4, 6, 7), (0, 4, 5, 5)]


def test_the_number_of_threads_does_not_matter() -> None:
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(results(cpu.per_image_depthwise, torch.float32, *inputs(2, 20, (80, 90), 7)))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(torch.equal(one, same) for one, same in zip(outputs[0], other, strict=True))


def test_what_the_operator_does_not_take() -> None:
    x, kernel = inputs(1, 4, (6, 7), 3)
    assert input_reasons(x.double(), kernel) == ["it takes float32, not torch.float64"]
    assert input_reasons(x, kernel.to("meta")) == ["it runs on cpu, not on meta"]
    with pytest.raises(RuntimeError, match=r"a kernel of shape \[1, 4, 3, 3\] does not fit x of shape \[1, 3, 6, 7\]"):
        cpu.per_image_depthwise(x[:, :3], kernel)


def test_only_the_gradients_asked_for() -> None:
    x, kernel = inputs(2, 16, (9, 8), 5)
    for chosen in range(2):
        leaves = [value.detach().requires_grad_(i == chosen) for i, value in enumerate((x, kernel))]
        ours, expected = (
            torch.autograd.grad(function(*leaves).square().sum(), leaves[chosen])[0]
            for function in (cpu.per_image_depthwise, reference.per_image_depthwise)
        )
        assert max_error(ours, expected) < 1e-5 * expected.abs().max().item()


def test_registered_as_pytorch_wants() -> None:
    x, kernel = inputs(2, 5, (9, 8), 3)
    leaves = [value.detach().requires_grad_() for value in (x, kernel)]
    torch.library.opcheck(torch.ops.esc_arch.depthwise_per_image_cpu.default, leaves)
    operator = torch.ops.esc_arch.depthwise_per_image_backward_cpu.default
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (normal(*x.shape, seed=6), x, kernel, *wanted)
        torch.library.opcheck(operator, arguments, test_utils=FORWARD_ONLY)


def decomposed_inputs() -> list[Tensor]:
    x = normal(2, 8, 20, 17).contiguous(memory_format=torch.channels_last)
    return [x, normal(8, 8, 1, 1, seed=1), normal(8, 1, 13, 13, seed=2), normal(2, 8, 3, 3, seed=3)]


def test_decomposed_conv_attention_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = results(decomposed_conv_attention, torch.float32, *decomposed_inputs())
    exact = results(decomposed_conv_attention, torch.float64, *decomposed_inputs())
    for fast, truth in zip(ours, exact, strict=True):
        assert max_error(fast, truth) < 1e-5 * truth.abs().max().item()

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("the plain formula was called")

    monkeypatch.setattr(reference, "per_image_depthwise", refuse)
    decomposed_conv_attention(*decomposed_inputs())
    with pytest.raises(AssertionError, match="the plain formula was called"):
        decomposed_conv_attention(*(tensor.double() for tensor in decomposed_inputs()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:", "ignore::torch.jit.TracerWarning")
def test_compiled_and_exported() -> None:
    layer = DecomposedConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True).eval()
    x = normal(2, 6, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        assert max_error(traced, eager) < 1e-5 * max(1.0, eager.abs().max().item())
    exported = torch.export.export(layer, (x,))
    assert "ops.esc_arch" not in exported.graph_module.code
    assert "esc_arch::" not in str(torch.jit.trace(layer, x).inlined_graph)
    assert max_error(exported.module()(x), layer(x)) < 1e-5
