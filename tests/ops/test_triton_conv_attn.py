"""ConvAttn's Triton kernels: on a GPU, in Triton's interpreter, and compiled for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import max_error, needs_cuda, normal
from torch import Tensor
from triton_testing import (
    DEVICES,
    INTERPRETED,
    compile_for_a_gpu,
    interpret_quickly_and_strictly,
    needs_triton,
    skip_without_assembler,
)

from esc_arch.modules import ConvAttn
from esc_arch.ops import triton_support
from esc_arch.ops.autotune import trial
from esc_arch.ops.autotune.trial import allowed_error
from esc_arch.ops.conv_attn import conv_attention, symmetrise, triton
from esc_arch.ops.conv_attn.api import CONV_ATTN
from esc_arch.ops.dispatch import OPERATIONS

OPERATION = OPERATIONS["ConvAttn"]
backend = triton
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}

#: pdim, side, dynamic side, (B, H, W), type, layout, symmetric: channels and groups of outputs that are padded,
#: several blocks, rows and maps smaller than the kernel, and a single pixel.
CASES = [
    (16, 13, 3, (2, 5, 9), FLOAT, "channels last", False),
    (16, 13, 3, (1, 4, 6), FLOAT, "NCHW", True),
    (16, 13, 3, (1, 1, 1), BRAIN, "channels last", True),
    (16, 13, 3, (1, 20, 33), HALF, "channels last", True),
    (16, 5, 3, (2, 5, 9), HALF, "NCHW", False),
    (16, 5, 3, (2, 5, 9), BRAIN, "channels last", True),
    (4, 3, 3, (2, 10, 33), FLOAT, "NCHW", False),
    (4, 3, 5, (2, 5, 9), FLOAT, "channels last", True),
    (4, 1, 1, (1, 3, 2), FLOAT, "NCHW", True),
    (48, 7, 3, (1, 2, 3), BRAIN, "channels last", False),
    (20, 5, 3, (1, 3, 4), HALF, "NCHW", True),
]
LARGE_CASES = [
    (pdim, 13, 3, size, dtype, layout, symmetric)
    for pdim, size in [(16, (2, 180, 321)), (48, (1, 65, 70))]
    for dtype in (FLOAT, BRAIN, HALF)
    for layout in LAYOUTS
    for symmetric in (False, True)
]


@pytest.fixture(autouse=True)
def interpret_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        interpret_quickly_and_strictly(monkeypatch)
        monkeypatch.setattr(backend, "PROGRAMS", 1)


@pytest.fixture(autouse=True)
def all_bits_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "tf32_in_convolutions", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # of the reference too


def inputs(case: tuple[Any, ...], device: str = "cpu") -> list[Tensor]:
    """The first channels of a wider map, a symmetric large kernel, and the dynamic one."""
    pdim, side, dynamic_side, (batch, height, width), dtype, layout, _ = case
    wide = normal(batch, pdim + 8, height, width, seed=height * 100 + width).to(memory_format=LAYOUTS[layout])
    large, dynamic = normal(pdim, pdim, side, side, seed=3), normal(batch, pdim, dynamic_side, dynamic_side, seed=4)
    return [tensor.to(device, dtype) for tensor in (wide[:, :pdim], symmetrise(large), dynamic)]


def results(tensors: list[Tensor], name: str, symmetric: bool = False) -> list[Tensor]:
    """The output and the gradients, that of the large kernel through its symmetrisation, as in the networks."""

    def compute(*leaves: Tensor) -> Tensor:
        return conv_attention(*leaves, symmetric=symmetric, backend=name)

    return [OPERATION.canonicalise(number, part) for number, part in enumerate(trial.results(compute, tensors))]


def check_against_the_reference(case: tuple[Any, ...], device: str) -> None:
    """The interpreter cuts bfloat16 off, which a GPU rounds: twice the error that is allowed there."""
    tensors = inputs(case, device)
    dtype, layout, symmetric = case[-3:]
    exact = results([tensor.double() for tensor in tensors], "reference")
    plain, fast = results(tensors, "reference"), results(tensors, "triton", symmetric)
    factor = 4 if INTERPRETED and dtype is BRAIN else 2
    for name, expected, reference, actual in zip(OPERATION.parts, exact, plain, fast, strict=True):
        error, eps = max_error(reference, expected), torch.finfo(dtype).eps
        limit = allowed_error(expected, error, eps, roundings=OPERATION.roundings, factor=factor)
        assert max_error(actual, expected) <= limit, name
        assert actual.dtype == reference.dtype
    for part in fast[:2]:
        assert part.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: tuple[Any, ...], device: str) -> None:
    check_against_the_reference(case, device)


@needs_cuda
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_maps_against_the_reference(case: tuple[Any, ...]) -> None:
    check_against_the_reference(case, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [32, 128])
def test_other_groups_in_several_steps(columns: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 2 and of 8 outputs, of which several blocks meet the pixels of a row a few at a time."""
    from esc_arch.ops.conv_attn import triton_kernels as kernels

    monkeypatch.setattr(kernels.convolve, "configs", [kernels._config(columns, 16, 4, 2)])
    check_against_the_reference((4, 5, 3, (1, 7, 12), FLOAT, "channels last", True), device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_without_symmetry(device: str) -> None:
    """Neither mirrored nor transposed in channels, so that no flip of a gradient can hide."""
    x, _, dynamic = inputs((4, 5, 3, (1, 6, 7), FLOAT, "NCHW", False), device)
    leaves = [x.requires_grad_(), normal(4, 4, 5, 5, seed=8).to(device).requires_grad_(), dynamic.requires_grad_()]
    gradients = []
    for name in ("reference", "triton"):
        out = conv_attention(*leaves, backend=name)
        gradients.append([out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=5).to(device))])
    for expected, actual in zip(*gradients, strict=True):
        assert max_error(actual, expected) < 1e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_and_other_shares(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the last bit when repeated, and nearly so when the sums are shared out differently."""
    tensors = inputs((4, 3, 3, (1, 13, 20), FLOAT, "channels last", True), device)
    first, again = (results(tensors, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    monkeypatch.setattr(backend, "PROGRAMS", 12)
    for one, other in zip(first, results(tensors, "triton"), strict=True):
        assert max_error(one, other) < 1e-5 * one.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradients_asked_for(device: str) -> None:
    tensors = inputs((4, 3, 3, (1, 3, 4), FLOAT, "NCHW", False), device)
    for chosen in range(3):
        leaves = [value.detach().requires_grad_(i == chosen) for i, value in enumerate(tensors)]
        gradients = [
            torch.autograd.grad(conv_attention(*leaves, backend=name).square().sum(), leaves[chosen])[0]
            for name in ("triton", "reference")
        ]
        assert max_error(*gradients) < 1e-5 * gradients[1].abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_and_no_input_modified(device: str) -> None:
    _, large, dynamic = inputs((4, 5, 3, (2, 6, 7), FLOAT, "NCHW", False), device)
    wide = normal(1, 8, 14, 6).to(device)
    before = wide.clone()
    view = wide.expand(2, -1, -1, -1)[:, ::2, ::2].transpose(2, 3)
    turned = dynamic.transpose(2, 3).contiguous().transpose(2, 3)
    expected = conv_attention(view, large, dynamic, backend="reference")
    assert max_error(conv_attention(view, large, turned, backend="triton"), expected) < 1e-4
    assert torch.equal(wide, before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_under_autocast(device: str) -> None:
    """Kernels that are float32 parameters, a map in half precision."""
    tensors = inputs((4, 3, 3, (1, 4, 5), FLOAT, "channels last", True), device)
    outs = []
    for name in ("reference", "triton"):
        with torch.autocast(device, dtype=BRAIN):
            outs.append(conv_attention(*(x.requires_grad_() for x in tensors), symmetric=True, backend=name))
    assert outs[1].dtype == BRAIN
    assert max_error(*outs) < 0.02 * outs[0].abs().max().item()
    gradients = [torch.autograd.grad(out.float().square().sum(), tensors) for out in outs]
    for plain, fast in zip(*gradients, strict=True):
        assert fast.dtype == FLOAT
        if plain.shape == tensors[1].shape:
            plain, fast = symmetrise(plain), symmetrise(fast)
        assert max_error(fast, plain) < 0.05 * plain.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_for_a_compiler(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes forward and backward of a layer in as they are, and other sizes of maps in the same graph."""
    torch.compiler.reset()
    monkeypatch.setattr(CONV_ATTN, "order", ("triton",))
    monkeypatch.setattr(backend.results, "auto_skip_reasons", lambda *_: [])
    layer = ConvAttn(dim=6, pdim=4, kernel_size=3, own_kernel=True).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    graphs = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor" if device == "cuda" else "aot_eager")(graph, example_inputs)

    compiled = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    for size in [(4, 5), (3, 7)]:
        gradients = []
        for call in (layer, compiled):
            layer.zero_grad()
            call(normal(1, 6, *size).to(device)).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
        for eager, traced in zip(*gradients, strict=True):
            assert max_error(traced, eager) < 1e-4 * max(1.0, eager.abs().max().item())
    assert len(graphs) == 1
    assert "conv_attention_triton" in str(graphs[0].graph)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_well_defined(layout: str, device: str) -> None:
    """Shapes and layouts without data, gradients, and no input written to: PyTorch's own checks."""
    x, large, dynamic = inputs((4, 1, 1, (2, 3, 5), FLOAT, layout, False), device)
    taps = large.permute(2, 3, 0, 1).contiguous()
    leaves = [value.detach().requires_grad_() for value in (x, taps, dynamic)]
    torch.library.opcheck(
        torch.ops.esc_arch.conv_attention_triton.default,
        (*leaves, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(
            torch.ops.esc_arch.conv_attention_backward_triton.default,
            (x.clone(), x, taps, dynamic, True, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_cuda
def test_tf32_where_pytorch_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then, and only then, is the error that of TF32's ten bits."""
    tensors = inputs((16, 13, 3, (1, 40, 64), FLOAT, "channels last", True), "cuda")
    expected = conv_attention(*(tensor.double() for tensor in tensors), backend="reference")
    size = expected.abs().max().item()
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(backend, "tf32_in_convolutions", lambda allowed=allowed: allowed)
        errors[allowed] = max_error(backend.forward(*tensors, True), expected) / size
    assert errors[False] < 1e-6 < 1e-5 < errors[True] < 1e-3


@needs_cuda
def test_cuda_graph() -> None:
    """Captured once, it follows its inputs."""
    x, large, dynamic = inputs((16, 13, 3, (1, 40, 50), HALF, "channels last", True), "cuda")
    conv_attention(x, large, dynamic, symmetric=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = conv_attention(x, large, dynamic, symmetric=True, backend="triton")
    x.mul_(0.5)
    graph.replay()
    assert torch.equal(out, conv_attention(x, large, dynamic, symmetric=True, backend="triton"))


@needs_cuda
def test_new_sizes_compile_nothing() -> None:
    from esc_arch.ops.conv_attn import triton_kernels as kernels

    counts = []
    for size in [(1, 61, 64), (1, 64, 96), (2, 33, 31), (1, 1, 1), (3, 128, 130)]:
        results(inputs((16, 13, 3, size, HALF, "channels last", True), "cuda"), "triton", True)
        functions = (kernels.convolve.fn, kernels.correlate)
        counts.append(sum(len(cache[0]) for function in functions for cache in function.device_caches.values()))
    assert len(set(counts)) == 1


# --- how a map lies in memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 3, 5), (1, 1, 5), (2, 1, 1), (1, 1, 1), (1, 3, 1)])
def test_a_channels_last_map_is_read_in_place(size: tuple[int, int, int]) -> None:
    batch, height, width = size
    wide = normal(batch, 8, height, width).contiguous(memory_format=torch.channels_last)
    x, pixel = backend._readable(wide[:, :4])
    assert x.data_ptr() == wide.data_ptr()
    assert pixel == 8 or batch * height * width == 1


def test_other_maps_are_copied() -> None:
    maps = normal(2, 8, 6, 10).contiguous(memory_format=torch.channels_last)
    for x in (maps.contiguous(), maps[..., 1:, :], maps[..., ::3], maps[:, ::2], maps[:1].expand(2, -1, -1, -1)):
        copy, pixel = backend._readable(x)
        assert torch.equal(copy, x)
        assert copy.is_contiguous(memory_format=torch.channels_last)
        assert pixel == x.shape[1]


# --- compiled without a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def kernels() -> Iterator[Any]:
    yield from skip_without_assembler()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("channels", "dtype", "precision", "fold", "capability"),
    [
        (16, "bf16", "half", True, 90),
        (16, "fp16", "half", False, 80),
        (16, "fp32", "tf32", True, 90),
        (16, "fp32", "ieee", True, 90),
        (48, "bf16", "half", True, 90),
    ],
)
@pytest.mark.parametrize("name", ["convolve", "correlate"])
def test_compiles(name: str, channels: int, dtype: str, precision: str, fold: bool, capability: int) -> None:
    """To machine code that fits in the shared memory of the GPU."""
    from esc_arch.ops.conv_attn import triton_kernels as kernels

    kernel = getattr(kernels, name)
    block_c = 16 if channels == 16 else 64
    constants = {
        "PIXEL": 4 * channels,
        "GRADIENT_PIXEL": channels,
        "C": channels,
        "BLOCK_C": block_c,
        "SIDE": 13,
        "DYNAMIC_SIDE": 3,
        "OUT_LAST": True,
        "FOLD": fold,
        "PRECISION": precision,
    }
    if name == "convolve":
        config = kernel.configs[0]
    else:
        blocks = {"GROUP": 64 // block_c, "COUNT": 256 // block_c, "BLOCK": 32 if dtype == "fp32" else 64}
        config = kernels.Config(blocks, num_warps=8, num_stages=2)
    pointers = {**dict.fromkeys(("x", "gradient", "taps", "out"), dtype), "dynamic": "fp32", "sums": "fp32"}
    compiled = compile_for_a_gpu(kernel, constants, pointers, capability, config)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 160 * 1024
    assert ("mma" in compiled.asm["ptx"]) == (precision != "ieee")


# --- choice and reasons --------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU for it."""
    monkeypatch.setattr(triton_support, "missing", lambda *_: "")


def ask(x: Tensor, channels: int = 4, name: str = "triton", symmetric: bool = True) -> Tensor:
    kernels = torch.zeros(channels, channels, 3, 3), torch.zeros(x.shape[0], channels, 3, 3)
    return conv_attention(x, *kernels, symmetric=symmetric, backend=name)


def test_auto_asks_what_it_is_to_compute(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial is asked of the shapes, the precision and the mode."""
    asked, called, refused = [], [], []
    monkeypatch.setattr(backend.results, "auto_skip_reasons", lambda *subject: asked.append(subject) or refused)
    monkeypatch.setattr(backend, "tf32_in_convolutions", lambda: True)
    for name in ("triton", "reference"):
        monkeypatch.setattr(CONV_ATTN.backends[name], "forward", lambda *_, name=name: called.append(name))
    monkeypatch.setattr(CONV_ATTN, "order", ("triton", "reference"))
    for symmetric in (True, False):
        ask(torch.zeros(1, 4, 4, 4), name="auto", symmetric=symmetric)
    assert called == ["triton", "reference"]
    assert asked == [("ConvAttn", "ESC", FLOAT, True, False, "cpu", None)]
    refused.append("not tried")
    with torch.autocast("cpu", dtype=BRAIN):
        ask(torch.zeros(1, 48, 4, 4).requires_grad_(), 48, name="auto")
    assert called[2:] == ["reference"]
    assert asked[1][1:5] == ("ESC-XL", BRAIN, True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_types_are_refused(dtype: torch.dtype, anywhere: None) -> None:
    with pytest.raises(RuntimeError, match=rf"triton: its kernels take float32, bfloat16 and float16, not {dtype}"):
        ask(torch.zeros(1, 4, 4, 4, dtype=dtype))


def test_many_channels_are_refused(anywhere: None) -> None:
    with pytest.raises(RuntimeError, match="it takes up to 64 channels, not 65"):
        ask(torch.zeros(1, 65, 4, 4), 65)


def test_an_empty_map_is_refused(anywhere: None) -> None:
    with pytest.raises(RuntimeError, match="there is nothing to compute"):
        ask(torch.zeros(0, 4, 4, 4))


def test_kernels_elsewhere_are_refused(anywhere: None) -> None:
    with pytest.raises(RuntimeError, match="x is on meta, the kernels are on cpu and cpu"):
        ask(torch.zeros(1, 4, 4, 4, device="meta"))


def test_exporting_is_refused(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(RuntimeError, match="triton: a compiled kernel cannot be exported"):
        ask(torch.zeros(1, 4, 4, 4))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"it runs on GPUs \(on a CPU only in Triton's interpreter, TRITON_INTER"):
        ask(torch.zeros(1, 4, 4, 4))
