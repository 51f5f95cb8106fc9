"""Window attention alone: time, peak memory and errors of every backend and type that can run here.

    python benchmarks/attention.py --json attention.json

measures windows of 16, 32, 48, 64 and 96 pixels, 4 heads of 16 channels, on the map of an x4 network at 1280 x 720
output (320 x 180), forward, and forward and backward, on a GPU if there is one. It is one command there too; where time
is short, `--windows 32`, `--passes forward` and `--only flex triton` take a part of it. On a CPU the allocator decides
much:

    python benchmarks/attention.py --both-allocators

All settings of a window take turns, and ratios are of calls in the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import esc_arch  # isort: skip  # noqa: F401  makes basicsr importable
import common
import torch
from common import Call, Trial
from costs import Costs, window_attention_costs
from torch import Tensor

from esc_arch.ops.window_attention import WINDOW_ATTENTION, Bias, window_attention

NAIVE, FLEX = "naive", "flex"
#: What the others are compared with.
BASELINES = ("naive, fp32", "flex, fp32")
PASSES = ("forward", "both")
RANK = 16


@dataclass(frozen=True)
class Setting:
    """How attention is computed: `factors` have a bias of low rank in place of the table."""

    label: str
    backend: str
    precision: str = "fp32"
    channels_last: bool = False
    factors: bool = False


@dataclass
class Inputs:
    """A projection (1, 3C, H, W), a bias, and the gradient of the result, (1, C, H, W)."""

    qkv: Tensor
    bias: Bias
    gradient: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.qkv, self.bias) if isinstance(self.bias, Tensor) else (self.qkv, *self.bias)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.both_allocators:
        return common.run_with_both_allocators(__file__, argv, args.json)
    if args.of_own_process is not None:
        measure_own_process(args)
        return 0
    with common.fresh_compilation():
        record, ceilings = common.describe(args)
        for window, which in product(args.windows, args.passes):
            common.keep(record, measure(args, window, which == "both", ceilings), args.json)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 48, 64, 96])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--map", type=common.size, metavar="WxH", help="default: 320x180; with --quick 80x48")
    common.add_common_arguments(parser)
    args = parser.parse_args(argv)
    common.complete(args)
    args.map = args.map or common.size("80x48" if args.quick else "320x180")
    return args


def settings_for(device: str) -> list[Setting]:
    """Every backend and precision; other layouts for those that do not copy the windows out; factors for flash."""
    settings = []
    for precision in common.precisions_of(device):
        for backend in WINDOW_ATTENTION.backends:
            setting = Setting(f"{backend}, {precision}", backend, precision)
            settings.append(setting)
            if backend not in (NAIVE, FLEX):
                settings.append(_changed(setting, "channels_last", channels_last=True))
            if backend == "flash":
                settings.append(_changed(setting, f"factors of rank {RANK}", factors=True))
    return settings


def _changed(setting: Setting, label: str, **changes: Any) -> Setting:
    return Setting(**{**vars(setting), "label": f"{setting.label}, {label}", **changes})


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    settings = settings_for(args.device)
    if args.only is None:
        return settings
    return [each for each in settings if each.label in BASELINES or any(text in each.label for text in args.only)]


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, window: int, backward: bool, ceilings: common.Ceilings) -> dict[str, Any]:
    """Measure all settings of a window, forward alone or with the backward pass, and print their table."""
    settings = chosen_settings(args)
    # Two windows, the second of them mostly padding: naive attention in float64 of more would fill the memory
    small = (window, window + 4)
    common.progress(f"window {window}: float64")
    kinds = {(each.precision, each.factors): each for each in settings}
    references = {key: in_float64(args, window, small, each) for key, each in kinds.items()}
    trials, contexts = [], []
    for setting in settings:
        common.progress(f"window {window}: {setting.label}")
        trial = Trial(setting.label)
        if args.device == "cpu" and args.memory:
            common.measure_in_own_process(trial, __file__, own_arguments(args, window, backward, setting))
        context = partial(running, setting, args, window, backward)
        reference = references[setting.precision, setting.factors]
        trial.attempt(lambda: warm_up(trial, context, args.map, small, reference))  # noqa: B023  called at once
        trials.append(trial)
        contexts.append(partial(context, args.map))
    common.take_turns(trials, contexts, args.rounds)
    torch.compiler.reset()  # torch keeps compiled code, and only for so many sizes of window

    costs = costs_of(args, window, backward)
    bounds = [ceilings.least_seconds(costs.multiply_adds, costs.numbers, setting.precision) for setting in settings]
    print(f"\n{heading(args, window, backward, small, costs)}\n")
    print(common.latency_table(trials, BASELINES, bounds), flush=True)
    return {
        "window": window,
        "backward": backward,
        "map": args.map,
        "costs": vars(costs),
        "trials": [trial.as_record() | {"roofline": least} for trial, least in zip(trials, bounds, strict=True)],
    }


def costs_of(args: argparse.Namespace, window: int, backward: bool) -> Costs:
    """The backward pass has five products for two, and reads and writes twice what the forward pass does."""
    costs = window_attention_costs((args.heads * args.head_dim, *args.map), window)
    return Costs(costs.multiply_adds * 7 // 2, costs.symmetric * 7 // 2, costs.numbers * 3) if backward else costs


def make_inputs(args: argparse.Namespace, window: int, size: tuple[int, int], factors: bool) -> Inputs:
    """Random, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    channels = args.heads * args.head_dim
    bias: Bias = normal(args.heads, (2 * window - 1) ** 2)
    if factors:
        bias = normal(args.heads, window**2, RANK) * RANK**-0.5, normal(args.heads, window**2, RANK)
    return Inputs(normal(1, 3 * channels, *size), bias, normal(1, channels, *size))


def prepared(inputs: Inputs, setting: Setting, device: str, backward: bool) -> Inputs:
    """As a network hands them over under autocast: the projection in the lower type, the bias in float32."""
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format

    def lower(x: Tensor) -> Tensor:
        return x.to(device, common.dtype_of(setting.precision)).contiguous(memory_format=layout)

    biases = [part.to(device) for part in inputs.leaves[1:]]
    ready = Inputs(lower(inputs.qkv), _as_bias(biases), lower(inputs.gradient))
    for leaf in ready.leaves:
        leaf.requires_grad_(backward)
    return ready


@contextmanager
def running(
    setting: Setting, args: argparse.Namespace, window: int, backward: bool, size: tuple[int, int]
) -> Iterator[Call]:
    """Gives what computes the result and, with `backward`, the gradients: a tuple."""
    inputs = make_inputs(args, window, size, setting.factors)
    inputs = prepared(inputs, setting, args.device, backward)
    attend = partial(window_attention, window=window, heads=args.heads, backend=setting.backend)
    with common.tf32_of(setting.precision), torch.set_grad_enabled(backward):
        yield partial(_attend, attend, inputs, backward)


def _attend(attend: Callable[[Tensor, Bias], Tensor], inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    out = attend(inputs.qkv, inputs.bias)
    return (out, *torch.autograd.grad(out, inputs.leaves, inputs.gradient)) if backward else (out,)


def in_float64(args: argparse.Namespace, window: int, size: tuple[int, int], setting: Setting) -> tuple[Tensor, ...]:
    """Result and gradients for the inputs of a setting, rounded as they are; head by head, for the sake of memory."""
    inputs = prepared(make_inputs(args, window, size, setting.factors), setting, args.device, False)
    attend = partial(window_attention, window=window, heads=1, backend=NAIVE)
    results = []
    for head in range(args.heads):
        part = slice(head * args.head_dim, (head + 1) * args.head_dim)
        qkv = inputs.qkv.unflatten(1, (3, -1))[:, :, part].flatten(1, 2).double().requires_grad_()
        biases = [each[head : head + 1].double().requires_grad_() for each in inputs.leaves[1:]]
        with torch.enable_grad():
            results.append(_attend(attend, Inputs(qkv, _as_bias(biases), inputs.gradient[:, part].double()), True))
    out, of_qkv, *of_bias = zip(*results, strict=True)
    merged = torch.cat([each.unflatten(1, (3, -1)) for each in of_qkv], 2).flatten(1, 2)
    return torch.cat(out, 1).detach(), merged, *(torch.cat(each) for each in of_bias)


def _as_bias(parts: Sequence[Tensor]) -> Bias:
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def warm_up(
    trial: Trial,
    context: Callable[[tuple[int, int]], Any],
    size: tuple[int, int],
    small: tuple[int, int],
    exact: tuple[Tensor, ...],
) -> None:
    """The calls that compile, allocate, and choose kernels; memory on a GPU, and the errors."""
    with context(size) as call:
        common.warm_up(trial, call)
        trial.memory = common.gpu_peak(call) if torch.cuda.is_initialized() else trial.memory
    with context(small) as call:
        trial.error = max(relative_difference(*pair) for pair in zip(call(), exact, strict=False))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Of the largest number in what is expected: gradients of tables are sums over windows."""
    return common.largest_difference(actual, expected) / expected.abs().max().item()


def own_arguments(args: argparse.Namespace, window: int, backward: bool, setting: Setting) -> list[str]:
    """What a process needs to know that measures a setting by itself."""
    height, width = args.map
    arguments = ["--of-own-process", setting.label, "--device", "cpu", "--windows", str(window)]
    arguments += ["--passes", PASSES[backward], "--map", f"{width}x{height}"]
    return [*arguments, "--heads", str(args.heads), "--head-dim", str(args.head_dim)]


def measure_own_process(args: argparse.Namespace) -> None:
    """As `own_arguments` say."""
    setting = next(each for each in settings_for("cpu") if each.label == args.of_own_process)
    window = args.windows[0]
    context = partial(running, setting, args, window, args.passes[0] == "both")

    def small() -> None:
        with context((window, window + 4)) as call:
            call()

    common.report_own_process(Trial(setting.label), partial(context, args.map), small)


# --- telling --------------------------------------------------------------------------------------------------------


def heading(args: argparse.Namespace, window: int, backward: bool, small: tuple[int, int], costs: Costs) -> str:
    """What the table is about."""
    height, width = args.map
    text = (
        f"Window {window}, {'forward and backward' if backward else 'forward'} on {args.device}, {args.heads} heads of "
        f"{args.head_dim}, map {width} x {height}: {costs.multiply_adds / 1e9:.2f} G multiply-adds, "
        f"{costs.numbers / 1e6:.0f} M numbers read and written. Medians (least to most) of {args.rounds} rounds; "
        f"ratios: times as fast. Error: the largest difference from float64 over the largest number, "
        f"{'of the result and all gradients' if backward else 'of the result'}, on {small[1]} x {small[0]} pixels. "
    )
    if args.device == "cuda":
        return f"{text}First: the first call in this process. Memory: most allocated beyond the inputs."
    text += "First: until the first result of a new process. Memory: most resident beyond the inputs."
    return f"{text} fp16 and TF32 are not computed by CPUs."


if __name__ == "__main__":
    sys.exit(main())
