"""An image through the networks: time, peak memory and error of every backend and precision that can run here.

    python benchmarks/inference.py --json inference.json

measures ESC, ESC-light, ESC-FP and ESC-Real at 1280 x 720 output, x2, x3 and x4, on a GPU if there is one. It is one
command there too; where time is short, `--networks ESC --scales 4`, `--only auto` and `--no-compile` take a part of it.
On a CPU the allocator decides much:

    python benchmarks/inference.py --both-allocators

Everything is compared with (a) `naive`: eager, fp32, every step of the formula; (b) `flex`: the same with compiled flex
attention, which is what people run today; (c) SwinIR-light of BasicSR, as in the paper. All settings of a network and
scale take turns, and ratios are of calls in the same round. The networks are those of options/test_*.yml, with random
weights. torch.compile is measured on a GPU, and on a CPU with --compile: it takes minutes there.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import esc_arch  # isort: skip  # noqa: F401  makes basicsr importable
import common
import torch
from basicsr.archs import build_network
from basicsr.archs.swinir_arch import SwinIR
from common import Call, Trial
from costs import Costs, costs_of
from torch import Tensor, nn

from esc_arch.graphs import GraphedNetwork
from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.options.files import apply_force_yml, load_yaml

OPTIONS = Path(__file__).parents[1] / "options"
NETWORKS = ("ESC", "ESC-light", "ESC-FP", "ESC-Real")
NAIVE, FLEX, SWINIR = "naive", "flex", "SwinIR-light"
#: Where float64 sees a part of the LR image alone, so much of it; not a multiple of any window.
CROP = (72, 104)
#: What warms up a process that measures memory: a few windows, for one alone may be compiled differently.
SMALL = (40, 72)


@dataclass(frozen=True)
class Setting:
    """How an image is computed.

    Attributes:
        attention: attn_type, None for SwinIR.
        orders: the backends that `auto` may choose, by operation; of an operation that is not named, all.
        precision: of `common.PRECISIONS`, or default.
        all_low: weights and features are in that type, instead of autocast choosing what is.
        mode: eager, compiled or graph (eager, recorded as a CUDA graph).
    """

    label: str
    attention: str | None
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    channels_last: bool = False
    precision: str = "fp32"
    all_low: bool = False
    mode: str = "eager"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.both_allocators:
        return common.run_with_both_allocators(__file__, argv, args.json)
    logging.disable(logging.INFO)  # basicsr prints every network that it builds
    if args.of_own_process is not None:
        measure_own_process(args)
        return 0
    with common.fresh_compilation():
        record, ceilings = common.describe(args)
        for name, scale in product(args.networks, args.scales):
            if option_file(name, scale).exists():
                common.keep(record, measure(args, name, scale, ceilings), args.json)
            else:
                print(f"\nThere is no {name} x{scale}.", flush=True)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of options/test_*.yml, such as ESC-RIB"
    )
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--output", type=common.size, metavar="WxH", help="default: 1280x720; with --quick 256x192")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--precisions", nargs="+", choices=common.PRECISIONS, help="default: all that the device has")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the option files")
    common.add_common_arguments(parser)
    args = parser.parse_args(argv)
    common.complete(args)
    args.output = args.output or common.size("256x192" if args.quick else "1280x720")
    if args.compile is None:
        args.compile = args.device == "cuda"
    known = sorted(path.stem.removeprefix("test_").rpartition("_")[0] for path in OPTIONS.glob("test_*_x?.yml"))
    for name in args.networks:
        if name.replace("-", "_") not in known:
            names = ", ".join(dict.fromkeys(each.replace("_", "-") for each in known))
            parser.error(f"--networks: {name} has no option file; there are {names}")
    return args


def settings_for(device: str, compiled: bool) -> list[Setting]:
    """The baselines; then attention, layout, the other operations and precisions one at a time; then all of them."""
    plain = common.plain_orders()
    others = [name for name in OPERATIONS if name != "window attention"]
    backends = [name for name in OPERATIONS["window attention"].backends if name not in (NAIVE, FLEX)]
    settings = [Setting(NAIVE, NAIVE, plain), Setting(FLEX, FLEX, plain), Setting(SWINIR, None)]
    if device == "cuda":
        settings.append(Setting("flex, PyTorch's default (convolutions in TF32)", FLEX, plain, precision="default"))
    settings += [Setting(name, name, plain) for name in backends]
    settings.append(Setting("sdpa, channels_last", "sdpa", plain, channels_last=True))
    for name in others:
        for backend in list(OPERATIONS[name].backends)[1:]:
            label = f"sdpa, channels_last, {name} {backend}"
            settings.append(Setting(label, "sdpa", plain | {name: (backend,)}, channels_last=True))
    for precision in common.precisions_of(device):
        settings += _settings_in(precision, [NAIVE, FLEX, *backends], plain, device, compiled)
    return settings


def _settings_in(
    precision: str, backends: Sequence[str], plain: Mapping[str, Sequence[str]], device: str, compiled: bool
) -> Iterator[Setting]:
    suffix = "" if precision == "fp32" else f", {precision}"
    if suffix:
        for name in backends:
            yield Setting(f"{name}{suffix}", name, plain, precision=precision)
    auto = Setting(f"auto, channels_last{suffix}", "auto", channels_last=True, precision=precision)
    yield auto
    if compiled:
        yield _changed(auto, "compiled", mode="compiled")
    if device == "cuda":
        yield _changed(auto, "CUDA graph", mode="graph")
        if compiled:
            yield _changed(auto, "compiled, CUDA graph", mode="compiled graph")
    if precision in ("bf16", "fp16"):
        low = _changed(auto, "weights too", all_low=True)
        yield low
        if device == "cuda":
            yield _changed(low, "CUDA graph", mode="graph")
            if compiled:
                yield _changed(low, "compiled, CUDA graph", mode="compiled graph")


def _changed(setting: Setting, label: str, **changes: Any) -> Setting:
    return Setting(**{**vars(setting), "label": f"{setting.label}, {label}", **changes})


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    settings = settings_for(args.device, args.compile)
    if args.precisions is not None:
        settings = [each for each in settings if each.precision in args.precisions]
    if args.only is None:
        return settings
    return [each for each in settings if each.label in (NAIVE, FLEX) or any(text in each.label for text in args.only)]


# --- the networks ---------------------------------------------------------------------------------------------------


def option_file(name: str, scale: int) -> Path:
    return OPTIONS / f"test_{name.replace('-', '_')}_x{scale}.yml"


def make_network(args: argparse.Namespace, name: str, scale: int) -> nn.Module:
    opt = load_yaml(option_file(name, scale))
    apply_force_yml(opt, args.force_yml)
    return common.randomise(build_network(opt["network_g"])).eval().requires_grad_(False)


class SwinIRLight(nn.Module):
    """SwinIR with the light settings of its paper, for images of any size, the mask for this one ready.

    Shapes: (B, 3, H, W) -> (B, 3, H * scale, W * scale).
    """

    WINDOW = 8

    def __init__(self, scale: int, height: int, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.net = SwinIR(
            img_size=tuple(-(-side // self.WINDOW) * self.WINDOW for side in (height, width)),
            window_size=self.WINDOW,
            embed_dim=60,
            depths=[6, 6, 6, 6],
            num_heads=[6, 6, 6, 6],
            mlp_ratio=2,
            upscale=scale,
            upsampler="pixelshuffledirect",
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side * self.scale for side in x.shape[-2:])
        return self.net(reflect_pad_to_multiple(x, self.WINDOW))[:, :, :height, :width]


def make_swinir(scale: int, height: int, width: int) -> nn.Module:
    return SwinIRLight(scale, height, width).eval().requires_grad_(False)


def lr_size(args: argparse.Namespace, scale: int) -> tuple[int, int]:
    height, width = (side // scale for side in args.output)
    return height, width


def random_image(height: int, width: int, device: str) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)


class Runner:
    """A network as a setting has it."""

    def __init__(self, setting: Setting, net: nn.Module, device: str) -> None:
        self.setting, self.device = setting, device
        self.dtype = common.dtype_of(setting.precision)
        net = copy.deepcopy(net).to(device)
        if setting.attention is not None:
            common.set_attention(net, setting.attention)
        if setting.channels_last:
            net = net.to(memory_format=torch.channels_last)
        if setting.all_low:
            net = net.to(self.dtype)
        if "compiled" in setting.mode:
            net.compile(dynamic=False)
        self.run = GraphedNetwork(net) if "graph" in setting.mode else net

    @contextmanager
    def on(self, image: Tensor) -> Iterator[Call]:
        """Gives what computes this image."""
        if self.setting.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        if self.setting.all_low:
            image = image.to(self.dtype)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(common.tf32_of(self.setting.precision))
            stack.enter_context(common.choosing(self.setting.orders))
            if not self.setting.channels_last:
                stack.enter_context(common.layout_as_given())
            yield lambda: self._run(image)

    def _run(self, image: Tensor) -> Tensor:
        lower = self.dtype != torch.float32 and not self.setting.all_low
        with torch.autocast(self.device, self.dtype) if lower else nullcontext():
            return self.run(image)


def reference(net: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """An image and what float64 makes of it: the whole one on a GPU with memory enough, else a part of it."""
    if image.is_cuda:
        with suppress(torch.OutOfMemoryError):
            return image, in_float64(net, image)
        common.release_memory()
    crop = image[:, :, : CROP[0], : CROP[1]]
    return crop, in_float64(net, crop)


@torch.no_grad()
def in_float64(net: nn.Module, image: Tensor) -> Tensor:
    exact = copy.deepcopy(net).double()
    with common.plain_operations(exact):
        return exact(image.double())


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, scale: int, ceilings: common.Ceilings) -> dict[str, Any]:
    """Measure all settings of a network and scale, and print their table."""
    height, width = lr_size(args, scale)
    nets = {False: make_network(args, name, scale).to(args.device), True: make_swinir(scale, height, width)}
    image = random_image(height, width, args.device)
    common.progress(f"{name} x{scale}: float64")
    crop, exact = reference(nets[False], image)
    trials, contexts = [], []
    for setting in chosen_settings(args):
        common.progress(f"{name} x{scale}: {setting.label}")
        trial = Trial(setting.label)
        if args.device == "cpu" and args.memory:
            common.measure_in_own_process(trial, __file__, own_arguments(args, name, scale, setting))
        runner = Runner(setting, nets[setting.attention is None], args.device)
        trial.attempt(lambda: warm_up(trial, runner, image, crop, exact))  # noqa: B023  called at once
        trials.append(trial)
        contexts.append(partial(runner.on, image))
    common.take_turns(trials, contexts, args.rounds)
    torch.compiler.reset()  # torch keeps compiled code, and only for so many networks

    costs = {swinir: costs_of(net, height, width) for swinir, net in nets.items()}
    bounds = [
        ceilings.least_seconds(cost.multiply_adds, cost.numbers, setting.precision)
        for setting in chosen_settings(args)
        for cost in [costs[setting.attention is None]]
    ]
    print(f"\n{heading(args, name, scale, image, crop, exact, costs[False])}\n")
    print(common.latency_table(trials, (NAIVE, FLEX), bounds), flush=True)
    return {
        "network": name,
        "scale": scale,
        "image": [height, width],
        "costs": vars(costs[False]),
        "trials": [trial.as_record() | {"roofline": least} for trial, least in zip(trials, bounds, strict=True)],
    }


def warm_up(trial: Trial, runner: Runner, image: Tensor, crop: Tensor, exact: Tensor) -> None:
    """The calls that compile, allocate, and choose kernels; memory on a GPU, and the error."""
    with runner.on(image) as call:
        if "graph" in runner.setting.mode:  # whose memory is taken when it is recorded
            trial.memory = common.gpu_peak(lambda: common.warm_up(trial, call))
        else:
            common.warm_up(trial, call)
            trial.memory = common.gpu_peak(call) if image.is_cuda else trial.memory
    if runner.setting.attention is not None:
        with runner.on(crop) as call:
            trial.error = common.largest_difference(call(), exact)


def own_arguments(args: argparse.Namespace, name: str, scale: int, setting: Setting) -> list[str]:
    """What a process needs to know that measures a setting by itself."""
    height, width = args.output
    arguments = ["--of-own-process", setting.label, "--device", "cpu", "--networks", name, "--scales", str(scale)]
    arguments += ["--output", f"{width}x{height}", "--compile" if args.compile else "--no-compile"]
    return arguments + (["--force_yml", *args.force_yml] if args.force_yml else [])


def measure_own_process(args: argparse.Namespace) -> None:
    """As `own_arguments` say."""
    name, scale = args.networks[0], args.scales[0]
    setting = next(each for each in settings_for("cpu", args.compile) if each.label == args.of_own_process)
    height, width = lr_size(args, scale)
    net = make_swinir(scale, height, width) if setting.attention is None else make_network(args, name, scale)
    runner = Runner(setting, net, "cpu")

    def small() -> None:
        with runner.on(random_image(*SMALL, "cpu")) as call:
            call()

    common.report_own_process(Trial(setting.label), partial(runner.on, random_image(height, width, "cpu")), small)


# --- telling --------------------------------------------------------------------------------------------------------


def heading(
    args: argparse.Namespace, name: str, scale: int, image: Tensor, crop: Tensor, exact: Tensor, costs: Costs
) -> str:
    """What the table is about, and what is not in it."""
    height, width = image.shape[-2:]
    text = (
        f"{name} x{scale} on {args.device}, LR image {width} x {height}: {costs.multiply_adds / 1e9:.1f} G "
        f"multiply-adds ({costs.symmetric / 1e9:.1f} with the large kernel's equal taps added first), "
        f"{costs.numbers / 1e6:.0f} M numbers read and written by layers. Medians (least to most) of {args.rounds} "
        f"rounds; ratios: times as fast. "
        f"Error: the largest difference from float64, whose rms is {exact.square().mean().sqrt().item():.2g}, on "
        f"{'the whole image' if crop is image else '{} x {} pixels of it'.format(*reversed(crop.shape[-2:]))}. "
    )
    if args.device == "cuda":
        return f"{text}First: the first call in this process. Memory: most allocated beyond network and image."
    text += "First: until the first result of a new process. Memory: most resident beyond network and image. "
    text += "fp16 and TF32 are not computed by CPUs."
    return text if args.compile else f"{text} torch.compile takes minutes for each network and scale: add --compile."


if __name__ == "__main__":
    sys.exit(main())
