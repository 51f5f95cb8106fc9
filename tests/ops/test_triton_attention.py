"""The Triton kernels: on a GPU, in Triton's interpreter on the CPU, and compiled for a GPU that need not be there.

The tests in the interpreter are run by `test_triton_support.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import max_error, needs_cuda, normal
from torch import Tensor, nn
from triton_testing import (
    DEVICES,
    INTERPRETED,
    compile_for_a_gpu,
    interpret_quickly_and_strictly,
    needs_triton,
    skip_without_assembler,
)

from esc_arch.ops import triton_support
from esc_arch.ops.autotune import trial
from esc_arch.ops.autotune.trial import allowed_error
from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.window_attention import WINDOW_ATTENTION, triton, window_attention

OPERATION = OPERATIONS["window attention"]
backend = triton
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}

#: Window, heads, head dimension, (B, H, W), type, layout: several blocks of tokens and windows, windows that blocks do
#: not divide, head dimensions that are padded, and maps smaller than the window, its padding, and a single pixel.
CASES = [
    (8, 1, 16, (1, 8, 8), FLOAT, "channels last"),
    (4, 2, 16, (2, 4, 7), FLOAT, "NCHW"),
    (8, 1, 4, (1, 3, 7), FLOAT, "channels last"),
    (8, 1, 20, (1, 7, 8), FLOAT, "NCHW"),
    (5, 1, 20, (1, 6, 4), HALF, "channels last"),
    (8, 1, 16, (1, 8, 6), HALF, "NCHW"),
    (8, 1, 16, (1, 8, 6), BRAIN, "channels last"),
    (7, 1, 4, (1, 7, 2), BRAIN, "NCHW"),
    (5, 1, 16, (1, 1, 11), FLOAT, "channels last"),
    (4, 2, 16, (1, 1, 1), FLOAT, "NCHW"),
]
LARGE_CASES = [
    (window, 4, head_dim, (2, 2 * window - 5, window + 3), dtype, layout)
    for window, head_dim in [(16, 16), (24, 20), (32, 16), (48, 16), (32, 64), (16, 128), (96, 16)]
    for dtype in (FLOAT, BRAIN, HALF)
    for layout in LAYOUTS
]


@pytest.fixture(autouse=True)
def interpret_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        interpret_quickly_and_strictly(monkeypatch)


def inputs(
    case: tuple[Any, ...], device: str = "cpu", *, table_dtype: torch.dtype = FLOAT
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A projection, and a table such that the weights of the attention are neither flat nor all on one token."""
    window, heads, head_dim, (batch, height, width), dtype, layout = case
    qkv = normal(batch, 3 * heads * head_dim, height, width, seed=height * 100 + width, dtype=dtype)
    table = 2 * normal(heads, (2 * window - 1) ** 2, seed=window, dtype=table_dtype)
    return qkv.to(device, memory_format=LAYOUTS[layout]), table.to(device), {"window": window, "heads": heads}


def results(qkv: Tensor, table: Tensor, shape: dict[str, int], name: str) -> list[Tensor]:
    """The merged map, and the gradients of the projection and the table."""
    return trial.results(lambda *leaves: window_attention(*leaves, **shape, backend=name), (qkv, table))


def check_against_the_reference(case: tuple[Any, ...], device: str) -> None:
    """The interpreter cuts bfloat16 off, which a GPU rounds: twice the error that is allowed there."""
    qkv, table, shape = inputs(case, device)
    dtype = qkv.dtype
    exact = results(qkv.double(), table.double(), shape, "naive")
    plain, fast = (results(qkv, table, shape, name) for name in ("naive", "triton"))
    factor = 4 if INTERPRETED and dtype is BRAIN else 2
    for expected, reference, actual in zip(exact, plain, fast, strict=True):
        error, eps = max_error(reference, expected), torch.finfo(dtype).eps
        limit = allowed_error(expected, error, eps, roundings=OPERATION.roundings, factor=factor)
        assert max_error(actual, expected) <= limit
        assert actual.dtype == reference.dtype
    assert fast[0].is_contiguous(memory_format=LAYOUTS[case[-1]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: tuple[Any, ...], device: str) -> None:
    check_against_the_reference(case, device)


@needs_cuda
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_windows_against_the_reference(case: tuple[Any, ...]) -> None:
    check_against_the_reference(case, "cuda")


@needs_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_where_pytorch_is_told_so(layout: str) -> None:
    """Then, and only then, is the error that of TF32's ten bits."""
    qkv, table, shape = inputs((32, 4, 16, (1, 40, 64), FLOAT, layout), "cuda")
    expected = window_attention(qkv.double(), table.double(), **shape, backend="naive")
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            errors[precision] = max_error(window_attention(qkv, table, **shape, backend="triton"), expected)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 2e-5 < errors["high"] < 2e-2


@pytest.mark.parametrize("device", DEVICES)
def test_the_window_of_the_paper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, of a map smaller than one window; larger blocks keep the interpreter quick."""
    if INTERPRETED:
        from esc_arch.ops.window_attention import triton_kernels as kernels

        monkeypatch.setattr(kernels.attend, "configs", [kernels._config(128, 128, 4, 1)])
    qkv, table, shape = inputs((32, 1, 16, (1, 20, 29), FLOAT, "channels last"), device)
    with torch.no_grad():
        expected, plain, fast = (
            window_attention(x, table.to(x.dtype), **shape, backend=name)
            for x, name in [(qkv.double(), "naive"), (qkv, "naive"), (qkv, "triton")]
        )
    limit = allowed_error(expected, max_error(plain, expected), torch.finfo(FLOAT).eps, roundings=OPERATION.roundings)
    assert max_error(fast, expected) <= limit


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_are_equal_to_the_last_bit(device: str) -> None:
    """Padding and several windows: everything that could be added up in another order."""
    qkv, table, shape = inputs((4, 1, 16, (1, 3, 6), FLOAT, "channels last"), device)
    first, second = (results(qkv, table, shape, "triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_a_share_of_the_windows_to_each_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's gradient is the same in one share, in uneven ones and in one per window."""
    qkv, table, shape = inputs((4, 1, 16, (3, 4, 4), FLOAT, "NCHW"), device)
    gradients = []
    for programs in (1, 5, 100):
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        gradients.append(results(qkv, table, shape, "triton")[2])
    for gradient in gradients[1:]:
        assert max_error(gradient, gradients[0]) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    """A projection in half precision and a table that is a parameter; its gradient is float32."""
    projection = nn.Conv2d(16, 48, 1, device=device)
    table = nn.Parameter(normal(1, 49).to(device))
    x = normal(1, 16, 5, 4).to(device)
    maps = []
    for name in ("naive", "triton"):
        with torch.autocast(device, dtype=BRAIN):
            maps.append(window_attention(projection(x), table, window=4, heads=1, backend=name))
    assert maps[1].dtype == BRAIN
    assert max_error(*maps) < 0.02
    gradients = [torch.autograd.grad(out.float().square().sum(), [table, *projection.parameters()]) for out in maps]
    for plain, fast in zip(*gradients, strict=True):
        assert fast.dtype == FLOAT
        assert max_error(fast, plain) < 0.05 * max(1, plain.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_for_a_compiler(device: str) -> None:
    """torch.compile takes forward and backward in as they are, and other sizes of maps in the same graph."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda qkv, table: 2 * window_attention(qkv, table, window=4, heads=1, backend="triton"),
        fullgraph=True,
        dynamic=True,
        backend="inductor" if device == "cuda" else "aot_eager",
    )
    for size in [(1, 4, 4), (1, 3, 6)]:
        qkv, table, shape = inputs((4, 1, 16, size, FLOAT, "NCHW"), device)
        leaves = [qkv.requires_grad_(), table.requires_grad_()]
        out = compiled(*leaves)
        assert max_error(out, 2 * window_attention(*leaves, **shape, backend="naive")) < 1e-5
        gradients = torch.autograd.grad(out.sum(), leaves)
        expected = torch.autograd.grad(2 * window_attention(*leaves, **shape, backend="naive").sum(), leaves)
        for gradient, reference in zip(gradients, expected, strict=True):
            assert max_error(gradient, reference) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_well_defined(layout: str, device: str) -> None:
    """Shapes and layouts without data, gradients, and no input written to: PyTorch's own checks."""
    qkv, table, _ = inputs((4, 1, 16, (1, 3, 2), FLOAT, layout), device)
    torch.library.opcheck(
        torch.ops.esc_arch.window_attention_triton.default,
        (qkv.requires_grad_(), table.requires_grad_(), 4, 1, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_of_the_input(device: str) -> None:
    qkv, table, shape = inputs((4, 1, 16, (1, 5, 4), FLOAT, "NCHW"), device)
    expected = window_attention(qkv, table, **shape, backend="naive")
    wide = torch.cat([qkv, qkv], dim=3)
    for value in (wide[..., 4:], qkv.transpose(2, 3).contiguous().transpose(2, 3)):
        with torch.no_grad():
            assert max_error(window_attention(value, table, **shape, backend="triton"), expected) < 1e-5
        assert torch.equal(value, qkv)


@needs_cuda
def test_cuda_graph() -> None:
    """Captured once, it follows its inputs."""
    qkv, table, shape = inputs((32, 4, 16, (1, 40, 50), HALF, "channels last"), "cuda")
    with torch.no_grad():
        window_attention(qkv, table, **shape, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = window_attention(qkv, table, **shape, backend="triton")
        qkv.mul_(0.5)
        graph.replay()
        assert torch.equal(out, window_attention(qkv, table, **shape, backend="triton"))


@needs_cuda
def test_new_sizes_compile_nothing() -> None:
    from esc_arch.ops.window_attention import triton_kernels as kernels

    def compiled() -> int:
        functions = [
            kernels.attend.fn,
            kernels.differentiate_queries.fn,
            kernels.differentiate_keys.fn,
            kernels.differentiate_table,
        ]
        return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())

    counts = []
    for size in [(1, 61, 64), (1, 64, 96), (2, 33, 31), (1, 1, 1), (3, 256, 250)]:
        results(*inputs((32, 4, 16, size, HALF, "channels last"), "cuda"), "triton")
        counts.append(compiled())
    # Gradients of keys go elsewhere where there is padding, so that it takes two maps to have all kernels
    assert len(set(counts[1:])) == 1


# --- the pieces in PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
def test_sum_of_diagonals(window: int) -> None:
    x = normal(3, window, window, dtype=torch.float64)
    expected = torch.stack([x.diagonal(offset, 1, 2).sum(-1) for offset in range(1 - window, window)], dim=-1)
    assert max_error(backend._sum_diagonals(x), expected) < 1e-14


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_fold_is_the_gradient_of_padding(size: int) -> None:
    from esc_arch.ops.padding import reflect_pad

    for padded in range(size, 12):
        x = normal(1, 2, size, 3, dtype=torch.float64).requires_grad_()
        cotangent = normal(1, 2, padded, 3, seed=padded, dtype=torch.float64)
        (expected,) = torch.autograd.grad(reflect_pad(x, 0, 0, 0, padded - size), x, cotangent)
        assert max_error(backend._fold(cotangent, size, 2), expected) < 1e-14


# --- compiled without a GPU ----------------------------------------------------------------------------------------


def pointers(dtype: str) -> dict[str, str]:
    """What the kernels' pointers point at, for maps of this type."""
    maps = dict.fromkeys(("qkv", "out", "d_out", "d_qkv", "target"), dtype)
    return maps | dict.fromkeys(("table", "lse", "products", "sums"), "fp32")


@pytest.fixture
def kernels() -> Iterator[Any]:
    for _ in skip_without_assembler():
        from esc_arch.ops.window_attention import triton_kernels

        yield triton_kernels


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype", "precision", "last", "capability"),
    [
        (32, 16, "bf16", "half", True, 90),
        (32, 16, "fp16", "half", False, 80),
        (32, 16, "fp32", "tf32", True, 90),
        (32, 16, "fp32", "ieee", True, 90),
        (96, 20, "bf16", "half", True, 90),
    ],
)
@pytest.mark.parametrize("name", ["attend", "differentiate_queries", "differentiate_keys", "differentiate_table"])
def test_compiles(
    name: str, window: int, head_dim: int, dtype: str, precision: str, last: bool, capability: int, kernels: Any
) -> None:
    """The first configuration that suits it, to machine code that fits in the shared memory of the GPU."""
    constants = {
        "KEEP_LSE": True,
        "PADDED": True,
        "WINDOW": window,
        "HEADS": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "CHANNELS_LAST": last,
        "PRECISION": precision,
    }
    kernel = getattr(kernels, name)
    if name == "differentiate_table":
        config = kernels.Config({"BLOCK": 32}, num_warps=2, num_stages=3)
    else:
        config = kernels._fitting(kernel.configs, {}, **constants)[0]
    compiled = compile_for_a_gpu(kernel, constants, pointers(dtype), capability, config)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 160 * 1024
    assert ("mma" in compiled.asm["ptx"]) == (precision != "ieee")
    assert "ld.global.nc.f32" in compiled.asm["ptx"]


def test_configurations_suit_the_window_and_the_head(kernels: Any) -> None:
    def blocks(window: int, dim: int, precision: str = "half") -> list[tuple[int, int]]:
        arguments = {"WINDOW": window, "BLOCK_D": dim, "PRECISION": precision}
        chosen = kernels._fitting(kernels.attend.configs, {}, **arguments)
        return [(config.kwargs["BLOCK_Q"], config.kwargs["BLOCK_K"]) for config in chosen]

    assert blocks(32, 16) == [(128, 64), (64, 64), (128, 128), (32, 32)]
    assert blocks(8, 16) == [(64, 64), (32, 32)]
    assert blocks(4, 16) == [(32, 32)]
    assert blocks(32, 128) == [(128, 64), (64, 64), (32, 32)]
    assert blocks(32, 128, "ieee") == [(32, 32)]


# --- choice and reasons --------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU for it."""
    monkeypatch.setattr(triton_support, "missing", lambda *_: "")


def ask(qkv: Tensor, bias: Any) -> Tensor:
    return window_attention(qkv, bias, window=4, heads=1, backend="triton")


def test_auto_asks_what_it_is_to_compute(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial is asked of the shapes, the precision and the mode; by name it is taken in any case."""
    asked, called, reasons = [], [], ["not tried"]
    monkeypatch.setattr(backend.results, "auto_skip_reasons", lambda *subject: asked.append(subject) or reasons)
    monkeypatch.setattr(backend, "forward", lambda *_: called.append("triton") or torch.zeros(1))
    monkeypatch.setattr(WINDOW_ATTENTION, "order", ("triton", "naive"))
    qkv, table = normal(1, 48, 4, 4), normal(1, 49)
    window_attention(qkv, table, window=4, heads=1)
    assert (asked, called) == ([("window attention", "ESC", FLOAT, False, False, "cpu", None)], [])
    ask(qkv, table)
    assert (len(asked), called) == (1, ["triton"])
    reasons.clear()
    monkeypatch.setattr(backend, "tf32_in_products", lambda: True)
    window_attention(qkv.requires_grad_(), table, window=4, heads=1)
    assert asked[-1][2:5] == (FLOAT, True, True)
    with torch.no_grad():
        window_attention(normal(1, 3 * 192, 4, 4, dtype=BRAIN), normal(12, 49), window=4, heads=12)
    assert asked[-1][1:5] == ("ESC-XL", BRAIN, True, False)
    assert called == 3 * ["triton"]


@pytest.mark.parametrize("device", DEVICES)
def test_auto_never_interprets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESC_ARCH_TRITON", "1")
    qkv, table, shape = inputs((4, 1, 16, (1, 4, 4), FLOAT, "NCHW"), device)
    found = WINDOW_ATTENTION.explain(qkv, table, *shape.values())
    assert found.reasons["triton"] == []
    assert (found.chosen == "triton") == (device == "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_types_are_refused(dtype: torch.dtype, anywhere: None) -> None:
    with pytest.raises(RuntimeError, match=rf"kernels take float32, bfloat16 and float16, not {dtype}"):
        ask(torch.zeros(1, 48, 4, 4, dtype=dtype), torch.zeros(1, 49))


def test_large_heads_are_refused(anywhere: None) -> None:
    with pytest.raises(RuntimeError, match="take a head dimension of up to 128, not 129"):
        ask(torch.zeros(1, 3 * 129, 4, 4), torch.zeros(1, 49))


def test_factors_are_refused(anywhere: None) -> None:
    with pytest.raises(RuntimeError, match="read a table of biases, not factors: attn_type flash is made for these"):
        ask(torch.zeros(1, 48, 4, 4), (torch.zeros(1, 16, 2), torch.zeros(1, 16, 2)))


def test_exporting_is_refused(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(RuntimeError, match="triton: a compiled kernel cannot be exported"):
        ask(torch.zeros(1, 48, 4, 4), torch.zeros(1, 49))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_the_cpu_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"runs on GPUs \(on a CPU only in Triton's interpreter, TRITON_INTERPRET=1\)"
    ):
        ask(torch.zeros(1, 48, 4, 4), torch.zeros(1, 49))
