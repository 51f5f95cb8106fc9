"""Whole networks as CUDA graphs: which are kept, when they are recorded again, and what is refused."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import image, needs_cuda, randomise, small_esc
from torch import Tensor, nn

from esc_arch import ESC, graphs
from esc_arch.errors import UserError
from esc_arch.graphs import WARM_UP_CALLS, GraphedNetwork
from esc_arch.ops import triton_support
from esc_arch.ops.conv_attn.api import CONV_ATTN


class Doubling(nn.Module):
    """Says how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU of which only the order of calls is real; replaying changes nothing."""
    events: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Any:
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    stream = SimpleNamespace(wait_stream=lambda other: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: events.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: noted("graph"))
    monkeypatch.setattr(graphs, "_check_devices", lambda tensors: None)
    return events


def test_a_shape_is_recorded_once_after_a_warm_up(cuda: list[str]) -> None:
    net = Doubling().eval()
    call = GraphedNetwork(net)
    call(torch.ones(1, 3, 2, 2))
    expected = ["wait", "enter stream", "leave stream", "wait", "enter graph", "leave graph", "replay"]
    assert cuda == expected
    assert net.calls == WARM_UP_CALLS + 1
    call(torch.ones(1, 3, 2, 2))
    assert cuda == [*expected, "replay"]
    assert net.calls == WARM_UP_CALLS + 1


def test_results_have_memory_of_their_own(cuda: list[str]) -> None:
    call = GraphedNetwork(Doubling().eval())
    first = call(torch.ones(1, 3, 2, 2))
    assert not first.requires_grad
    first.zero_()
    assert torch.equal(call(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))


def test_the_shape_not_used_for_longest_is_dropped(cuda: list[str]) -> None:
    net = Doubling().eval()
    call = GraphedNetwork(net, keep=2)
    recorded = []
    for width in (1, 2, 1, 3, 1, 2):
        before = net.calls
        call(torch.ones(1, 3, 2, width))
        recorded.append(net.calls > before)
    assert recorded == [True, True, False, True, False, True]


def test_types_layouts_and_autocast_have_graphs_of_their_own(cuda: list[str]) -> None:
    net = Doubling().eval()
    call = GraphedNetwork(net, keep=9)
    x = torch.ones(2, 3, 4, 5)
    for number, variant in enumerate((x, x.double(), x.contiguous(memory_format=torch.channels_last)), 1):
        call(variant)
        assert net.calls == number * (WARM_UP_CALLS + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(x)
    assert net.calls == 4 * (WARM_UP_CALLS + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.load_state_dict({"weight": torch.tensor(3.0)}),
        lambda net: net.weight.detach().fill_(3.0),
        lambda net: setattr(net.weight, "data", torch.tensor(3.0)),
    ],
    ids=["loaded", "written", "moved"],
)
def test_changed_weights_are_noticed(change: Any, cuda: list[str]) -> None:
    net = Doubling().eval()
    call = GraphedNetwork(net)
    call(torch.ones(1, 3, 2, 2))
    change(net)
    assert torch.equal(call(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 3.0))


def test_forget(cuda: list[str]) -> None:
    net = Doubling().eval()
    call = GraphedNetwork(net)
    call(torch.ones(1, 3, 2, 2))
    net.weight = nn.Parameter(torch.tensor(3.0))
    call.forget()
    assert torch.equal(call(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 3.0))


def test_training_mode_is_refused() -> None:
    call = GraphedNetwork(Doubling())
    with pytest.raises(UserError, match=r"this network is in training mode: call net.eval\(\) first"):
        call(torch.ones(1, 3, 2, 2))


def test_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="need the network and its input on one CUDA device; here they are on cpu"):
        GraphedNetwork(small_esc().eval())(image(1, 3, 8, 8))


def test_two_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"here they are on cpu and meta\. Call the network itself instead"):
        GraphedNetwork(small_esc().eval().to("meta"))(image(1, 3, 8, 8))


# --- in a compiler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_a_network_with_triton_operators_is_one_graph_for_all_sizes(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes without data stand in for a GPU; they know no autocast."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setenv("ESC_ARCH_TRITON", "1")
    monkeypatch.setattr(CONV_ATTN, "order", ("triton",))
    monkeypatch.setattr(triton_support, "missing", lambda *_: "")
    net = small_esc(attn_type="auto", conv_blocks=1).to("meta")
    traced = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    counts = []
    compiled = torch.compile(net, backend=compiler, fullgraph=True, dynamic=True)
    for height, width in [(20, 27), (16, 40), (33, 18)]:
        x = torch.empty(1, 3, height, width, device="meta")
        with torch.set_grad_enabled(backward):
            out = compiled(x)
        assert out.shape == (1, 3, 2 * height, 2 * width)
        if backward:
            out.sum().backward()
        counts.append(len(traced))
    assert len(set(counts)) == 1  # of the first size alone, which a compiler may begin more than once
    for operator in ("conv_attention_triton", "window_attention_triton"):
        assert f"esc_arch.{operator}" in str(traced[-1].graph)


# --- on a GPU ------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return randomise(ESC(dim=32, n_blocks=2, num_heads=2, upscaling_factor=2)).eval().to("cuda")


@needs_cuda
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_those_of_the_network(layout: torch.memory_format, autocast: bool) -> None:
    """Of several shapes in turn, and after the weights changed."""
    net = network().to(memory_format=layout)
    call = GraphedNetwork(net)
    images = [image(1, 3, *size, seed=seed).cuda() for seed, size in enumerate([(33, 40), (64, 64), (33, 40)])]
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        for seed in range(2):
            randomise(net, seed)
            expected = [net(x) for x in images]
            for x, of_network in zip(images * 2, expected * 2, strict=True):
                assert torch.equal(call(x), of_network)


@needs_cuda
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_network_is_one_graph_and_can_be_recorded(dynamic: bool) -> None:
    """With the Triton operators in it: no graph break, and with `dynamic` no second compilation for another size."""
    torch.compiler.reset()
    net = network()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    call = GraphedNetwork(compiled)
    sizes = [(64, 96), (96, 64), (65, 70)] if dynamic else [(64, 96)]
    with torch.no_grad():
        compiled(image(1, 3, *sizes[0]).cuda())
        with torch.compiler.set_stance("fail_on_recompile" if dynamic else "default"):
            for size in sizes:
                x = image(1, 3, *size).cuda()
                assert torch.allclose(call(x), net(x), atol=1e-3)
