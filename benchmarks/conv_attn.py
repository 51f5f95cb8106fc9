"""ConvAttn's two convolutions alone: every backend, and two formulations that lost, on the CPU.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 python benchmarks/conv_attn.py

A 13 x 13 kernel of 16 channels that is symmetric, and a dynamic 3 x 3 kernel for each image: forward at the sizes of an
HD output, forward and backward at those of training, channels_last and NCHW. All formulations take turns; times are
medians of the rounds, errors are against float64, relative to the largest output.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.ops.conv_attn import conv_attention, symmetrise
from esc_arch.ops.conv_attn.api import CONV_ATTN
from esc_arch.ops.conv_attn.reference import per_image_depthwise

from common import machine, markdown, prepare_operators, timed  # isort: skip

CHANNELS, ALL_CHANNELS, SIDE = 16, 64, 13
#: (batch, height, width, with gradients)
CASES = [(1, 180, 320, False), (1, 360, 640, False), (4, 64, 64, True), (16, 64, 64, True)]

Convolutions = Callable[[Tensor, Tensor, Tensor], Tensor]


def folded_to_28_taps(x: Tensor, large: Tensor, dynamic: Tensor) -> Tensor:
    """The rows, columns and diagonals that share a tap are added first, and 28 maps multiplied."""
    (height, width), reach = x.shape[-2:], large.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4)

    def pair(of: Tensor, distance: int, dim: int, size: int) -> Tensor:
        before = of.narrow(dim, reach - distance, size)
        return before if distance == 0 else before + of.narrow(dim, reach + distance, size)

    rows = [pair(padded, j, 2, height) for j in range(reach + 1)]
    both = [[pair(row, i, 3, width) for i in range(reach + 1)] for row in rows]
    places = [(j, i) for j in range(reach + 1) for i in range(j + 1)]
    maps = [both[j][i] if i == j else both[j][i] + both[i][j] for j, i in places]
    taps = torch.cat([large[:, :, reach + j, reach + i] for j, i in places], dim=1)
    return F.conv2d(torch.cat(maps, dim=1), taps[..., None, None]) + per_image_depthwise(x, dynamic)


def by_torch_fft(x: Tensor, large: Tensor, dynamic: Tensor) -> Tensor:
    """The whole image transformed at once."""
    (height, width), reach = x.shape[-2:], large.shape[-1] // 2
    size = (height + 2 * reach, width + 2 * reach)
    product = torch.einsum("bihw,oihw->bohw", torch.fft.rfft2(x, size), torch.fft.rfft2(large.flip(-1, -2), size))
    static = torch.fft.irfft2(product, size)[..., reach : reach + height, reach : reach + width]
    return static + per_image_depthwise(x, dynamic)


def formulations(example: tuple[Tensor, Tensor, Tensor]) -> dict[str, Convolutions]:
    """Those that can run here, the reference first."""

    def of(backend: str) -> Convolutions:
        return lambda *inputs: conv_attention(*inputs, symmetric=True, backend=backend)

    able = [name for name, reasons in CONV_ATTN.explain(*example, True).reasons.items() if not reasons]
    return {name: of(name) for name in able} | {"28 taps": folded_to_28_taps, "torch.fft": by_torch_fft}


def inputs(batch: int, height: int, width: int, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x as the network has it, the first of more channels; the large and the dynamic kernels."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, ALL_CHANNELS, height, width).contiguous(memory_format=layout)[:, :CHANNELS]
    large = symmetrise(torch.randn(CHANNELS, CHANNELS, SIDE, SIDE) / 50)
    return x, large, torch.randn(batch, CHANNELS, 3, 3)


def call_of(run: Convolutions, values: tuple[Tensor, Tensor, Tensor], gradients: bool) -> Callable[[], object]:
    if not gradients:
        return lambda: run(*values)
    leaves = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in values]
    return lambda: torch.autograd.grad(run(*leaves).sum(), leaves)


def measure(case: tuple[int, int, int, bool], channels_last: bool, rounds: int) -> list[str]:
    """A row of the table: milliseconds, and how many times as fast as the reference."""
    *size, gradients = case
    values = inputs(*size, channels_last)
    with torch.set_grad_enabled(gradients):
        calls = {name: call_of(run, values, gradients) for name, run in formulations(values).items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(timed(call))
    medians = [statistics.median(each) for each in seconds.values()]
    batch, height, width = size
    label = f"{'channels_last' if channels_last else 'NCHW'}, {batch}x{CHANNELS}x{height}x{width}"
    label += ", forward and backward" if gradients else ", forward"
    return [label, *(f"{median * 1e3:.2f} ({medians[0] / median:.2f})" for median in medians)]


def errors() -> list[str]:
    values = inputs(1, 45, 80, True)
    runs = formulations(values)
    exact = runs["reference"](*(value.double() for value in values))
    with torch.no_grad():
        found = [(run(*values).double() - exact).abs().max() / exact.abs().max() for run in runs.values()]
    return ["error", *(f"{float(error):.1e}" for error in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it works")
    args = parser.parse_args()
    torch.manual_seed(0)
    operators = prepare_operators()
    print(f"{machine('cpu')}; {operators}\n", flush=True)
    cases = [(1, 24, 32, True)] if args.quick else CASES
    rows = [measure(case, layout, args.rounds) for layout in (True, False) for case in cases]
    names = formulations(inputs(1, 8, 8, True))
    print(markdown(["ms (times as fast)", *names], [*rows, errors()]))


if __name__ == "__main__":
    main()
