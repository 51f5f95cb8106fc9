"""The layout in which networks run."""

from __future__ import annotations

import pytest
import torch
from networks import SMALL, image, max_error, randomise
from torch import Tensor, nn

from esc_arch import ESC, ESCFP, ESCReal
from esc_arch.ops.layout import fast_layout

NETWORKS = {
    "ESC": lambda: ESC(**SMALL),
    "ESCFP": lambda: ESCFP(**SMALL),
    "ESCReal": lambda: ESCReal(**{**SMALL, "upscaling_factor": 4}),
}


def test_channels_last_on_the_cpu_alone() -> None:
    x = image(2, 3, 4, 5)
    assert fast_layout(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fast_layout(x), x)
    assert fast_layout(x.to("meta")).is_contiguous()


def test_an_exported_network_keeps_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert fast_layout(image(2, 3, 4, 5)).is_contiguous()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_keeps_it_to_the_end_and_hands_out_plain_memory(name: str) -> None:
    net = randomise(NETWORKS[name]()).eval()
    layouts = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for block in net.blocks:
        block.register_forward_hook(note)
    x = image(1, 3, 20, 27)
    with torch.no_grad():
        out = net(x)
        assert max_error(net(x.contiguous(memory_format=torch.channels_last)), out) < 1e-4
    assert layouts == [True] * (2 * len(net.blocks))
    assert out.is_contiguous()
