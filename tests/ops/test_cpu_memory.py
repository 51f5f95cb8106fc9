"""Maps that are handed on from operator to operator while a network runs, and given back after it."""

from __future__ import annotations

import resource
import threading

import pytest
import torch
from basicsr.archs import build_network
from networks import normal, randomise
from torch import Tensor

from esc_arch.ops import cpu
from esc_arch.ops.layer_norm import layer_norm

pytestmark = pytest.mark.usefixtures("native")

#: Of maps that are large enough to be kept, two megabytes.
SHAPE = (1, 64, 96, 96)


def normalised(x: Tensor) -> Tensor:
    return layer_norm(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), eps=1e-6, backend="cpu")


def image() -> Tensor:
    return normal(*SHAPE).contiguous(memory_format=torch.channels_last)


def test_what_is_freed_is_used_again_and_nothing_else() -> None:
    x = image()
    with cpu.reusing_memory(x):
        first = normalised(x)
        place, expected = first.data_ptr(), first.clone()
        second = normalised(2 * x)
        assert second.data_ptr() != place and torch.equal(first, expected)
        part = first[:, 3:]
        del first
        third = normalised(3 * x)  # a part is still held
        assert third.data_ptr() != place and torch.equal(part, expected[:, 3:])
        del part
        assert normalised(x).data_ptr() == place


def test_results_outlive_the_block() -> None:
    x = image()
    with cpu.reusing_memory(x):
        kept = normalised(x)
    expected = kept.clone()
    others = [normalised(x + index) for index in range(4)]
    assert torch.equal(kept, expected) and all(torch.isfinite(other).all() for other in others)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    kept += 1
    assert torch.equal(kept, expected + 1)


def test_blocks_in_blocks_and_after_an_exception() -> None:
    x = image()
    with pytest.raises(ValueError, match="within"), cpu.reusing_memory(x), cpu.reusing_memory(x):
        raise ValueError("within")
    with cpu.reusing_memory(x):
        with cpu.reusing_memory(x):
            place = normalised(x).data_ptr()
        assert normalised(x).data_ptr() == place


def test_several_threads() -> None:
    x, expected, faults = image(), normalised(image()), list[str]()

    def work() -> None:
        for _ in range(30):
            with cpu.reusing_memory(x):
                if not all(torch.equal(normalised(x), expected) for _ in range(3)):
                    faults.append("another result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_network_takes_few_new_pages() -> None:
    """Each of its many maps would be new pages: they are more than the 32 MiB that the C library keeps."""
    net = build_network({"type": "ESC", "upscaling_factor": 2, "window_size": 16, "n_blocks": 2}).eval()
    randomise(net)
    x = normal(1, 3, 384, 384)
    with torch.inference_mode():
        net(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        net(x)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    a_map = 64 * 384 * 384 * 4 // resource.getpagesize()
    assert taken < 12 * a_map
