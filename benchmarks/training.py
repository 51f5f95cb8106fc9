"""A training step of base ESC: time, images/s and peak memory of what people have today and of the speed options.

    python benchmarks/training.py --curves

does everything, on a GPU if there is one: x2 and x4 at the published settings (64 x 64 LR patches, batch 16 on a GPU),
and 500-step loss curves in fp32 and bf16 (training_curves.py, which also runs alone). All settings of a scale are
measured side by side: a step is `feed_data` and `optimize_parameters` of the model that the option file builds, the
steps of the settings take turns, and ratios are of steps in the same round.

On a CPU the batch is 2, and torch.compile is left out unless --compile asks for it: two cores take a minute and a half
for each of three settings of each scale. Glibc's allocator decides much of a CPU's time; with memory that is kept:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 python benchmarks/training.py
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import esc_arch  # noqa: F401  # isort: skip  makes basicsr importable
import torch
from basicsr.models import build_model

from esc_arch.options.files import apply_force_yml, load_yaml

from common import (  # isort: skip
    choosing,
    high_water,
    layout_as_given,
    machine,
    markdown,
    plain_orders,
    prepare_operators,
    progress,
    synchronize,
)

OPTIONS = Path(__file__).parents[1] / "options"
CPU_BATCH = 2
WARM_UP = 3
#: (rounds, steps per round); on a GPU single steps are shorter than what starting and ending a measurement takes.
REPEATS = {"cpu": (5, 1), "cuda": (10, 10)}
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """How a step is computed: an attention backend, and options of `train:` and of its `optim_g`.

    Attributes:
        plain: all other operations by their readable references, and on a CPU in the layout that they get; without, as
            `auto` chooses.
    """

    label: str
    attention: str = "sdpa"
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    plain: bool = True


def settings_for(device: str, compiled: bool) -> list[Setting]:
    """What people have today, then one option more in each line."""
    backends = ["naive", "sdpa"] if device == "cpu" else ["naive", "flex", "sdpa"]
    options: list[tuple[str, dict[str, Any]]] = [
        ("channels_last", {"channels_last": True}),
        ("compile", {"compile": True}),
        ("bf16", {"amp": "bf16"}),
    ]
    fused, not_fused = {"fused": True}, {"fused": False}  # esc_arch's own default on the CPU is fused
    settings = [Setting(f"fp32 {backend}", backend, optimizer=not_fused) for backend in backends]
    train: dict[str, Any] = {}
    for label, option in options:
        if label != "compile" or compiled:
            train = train | option
            settings.append(Setting(f"+ {label}", train=train, optimizer=not_fused))
    settings.append(Setting("+ fused AdamW", train=train, optimizer=fused))
    settings.append(Setting("+ checkpointing", train=train | {"activation_checkpointing": True}, optimizer=fused))
    if device == "cuda":
        settings.append(Setting("fused AdamW, flex", "flex", train, fused))
    else:
        settings.append(Setting("fp32 auto (C++ operators)", "auto", plain=False))
    return settings


@dataclass
class Trial:
    """What was measured of a setting; `failure` says why there is no more."""

    setting: Setting
    model: Any = None
    iteration: int = 0
    first_step: float | None = None
    loss: float | None = None
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """What fails must not cost the figures of the other settings."""
        if self.failure is not None:
            return
        try:
            action()
        except Exception as error:
            out = isinstance(error, torch.OutOfMemoryError)
            self.failure = "out of memory" if out else f"{type(error).__name__}, see above"
            if not out:
                traceback.print_exc()
        if self.failure is not None:  # after the exception, whose frames hold tensors
            self.model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def step(self, batch: dict[str, torch.Tensor], count: int = 1) -> float:
        """Seconds per step of `count` steps."""
        with ExitStack() as stack:
            if self.setting.plain:
                others = {name: order for name, order in plain_orders().items() if name != "window attention"}
                stack.enter_context(choosing(others))
                stack.enter_context(layout_as_given())
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                self.iteration += 1
                self.model.update_learning_rate(self.iteration)
                self.model.feed_data(batch)
                self.model.optimize_parameters(self.iteration)
            synchronize()
            return (time.perf_counter() - start) / count


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.disable(logging.INFO)  # basicsr prints every network that it builds
    if args.memory is not None:
        print(json.dumps(resident_peak(args)))
        return
    if args.curves:
        import training_curves  # fails for want of matplotlib before anything is measured
    operators = prepare_operators()
    print(f"{machine(args.device)}; {operators}", flush=True)
    # torch counts the networks of all settings together, and runs those beyond its limit uncompiled
    torch._dynamo.config.recompile_limit = 64
    # A cache of its own: what is compiled is compiled for the first time
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for scale in args.scale:
            measure_scale(args, scale)
    if args.curves:
        print(flush=True)
        training_curves.main(["--device", args.device, "--figure", str(args.figure)])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, nargs="+", choices=(2, 3, 4), default=[2, 4])
    parser.add_argument(
        "--batch", type=int, help=f"images of a step; default: the option file's 16, {CPU_BATCH} on a CPU"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, help="default: 10, 5 on a CPU")
    parser.add_argument("--steps", type=int, help="of each setting in a round; default: 10, 1 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--curves", action="store_true", help="also train 500 steps in fp32 and in bf16, and plot them")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parent / "figures" / "training_precision.png")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the option file")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # label of the setting that a process of its own measures
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds, steps = REPEATS[args.device]
    args.rounds, args.steps = args.rounds or rounds, args.steps or steps
    if args.compile is None:
        args.compile = args.device == "cuda"
    return args


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_scale(args: argparse.Namespace, scale: int) -> None:
    """Measure all settings of a scale and print their table."""
    opt = read_options(args, scale)
    batch = random_batch(opt, args.device)
    trials = [Trial(setting) for setting in settings_for(args.device, args.compile)]
    for trial in trials:
        progress(f"x{scale}: {trial.setting.label}")
        trial.attempt(lambda trial=trial: warm_up(trial, opt, batch))  # type: ignore[misc]
    for number in range(args.rounds):
        progress(f"x{scale}: round {number + 1} of {args.rounds}")
        for trial in trials:
            trial.attempt(lambda trial=trial: trial.seconds.append(trial.step(batch, args.steps)))  # type: ignore[misc]
    for trial in trials:
        trial.model = None
    if args.device == "cpu":  # last, when what they compile is in the cache and not in their memory
        for trial in trials:
            progress(f"x{scale}: memory of {trial.setting.label}")
            trial.memory = peak_of_own_process(args, scale, trial) if trial.failure is None else None
    # Compiled code is kept by the function of torch that calls any network, and only for so many networks
    torch.compiler.reset()
    print(f"\n{heading(args, scale, batch)}\n\n{table(trials, len(batch['lq']))}", flush=True)


def warm_up(trial: Trial, opt: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    """Build the model, and make the steps that compile, allocate, and choose kernels."""
    on_gpu = opt["num_gpu"] > 0
    before = torch.cuda.memory_allocated() if on_gpu else 0
    trial.model = make_model(opt, trial.setting)
    trial.first_step = trial.step(batch)
    for number in range(1, WARM_UP):
        if on_gpu and number + 1 == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        trial.step(batch)
    if on_gpu:
        trial.memory = torch.cuda.max_memory_allocated() - before
    trial.loss = sum(trial.model.get_current_log().values())


def read_options(args: argparse.Namespace, scale: int) -> dict[str, Any]:
    """The shipped option file, as a run would have it."""
    opt = load_yaml(OPTIONS / f"train_ESC_x{scale}.yml")
    apply_force_yml(opt, args.force_yml)
    opt |= {"num_gpu": int(args.device == "cuda"), "dist": False, "rank": 0, "world_size": 1, "is_train": True}
    opt["path"] = {"pretrain_network_g": None}
    train = opt["datasets"]["train"]
    train["batch_size_per_gpu"] = args.batch or (CPU_BATCH if args.device == "cpu" else train["batch_size_per_gpu"])
    return opt


def random_batch(opt: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    """As a data loader hands it over: on the CPU, pinned for a GPU."""
    train, generator = opt["datasets"]["train"], torch.Generator().manual_seed(0)
    sizes = {"lq": train["gt_size"] // opt["scale"], "gt": train["gt_size"]}
    shapes = {name: (train["batch_size_per_gpu"], 3, size, size) for name, size in sizes.items()}
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return {name: images.pin_memory() for name, images in batch.items()} if device == "cuda" else batch


def make_model(opt: dict[str, Any], setting: Setting) -> Any:
    """The same weights for all settings."""
    train = opt["train"] | setting.train | {"optim_g": opt["train"]["optim_g"] | setting.optimizer}
    network = opt["network_g"] | {"attn_type": setting.attention}
    torch.manual_seed(0)
    return build_model(opt | {"train": train, "network_g": network})


def peak_of_own_process(args: argparse.Namespace, scale: int, trial: Trial) -> int | None:
    """What a setting adds to the resident memory of a process, in bytes; in one process the settings share it."""
    command = [sys.executable, __file__, "--memory", trial.setting.label, "--device", "cpu", "--scale", str(scale)]
    command += ["--compile"] if args.compile else ["--no-compile"]
    command += ["--batch", str(args.batch)] if args.batch else []
    command += ["--force_yml", *args.force_yml] if args.force_yml else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        trial.failure = "out of memory?" if done.returncode < 0 else "failed, see above"
        return None
    peak: int | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def resident_peak(args: argparse.Namespace) -> int | None:
    """The most that this process has had, without what it had before it built the model; None where unknown."""
    setting = next(each for each in settings_for(args.device, args.compile) if each.label == args.memory)
    opt = read_options(args, args.scale[0])
    batch = random_batch(opt, args.device)
    trial, before = Trial(setting, make_model(opt, setting)), high_water()
    trial.step(batch)
    trial.step(batch)  # with the optimiser's state
    after = high_water()
    return None if before is None or after is None else after - before


# --- telling --------------------------------------------------------------------------------------------------------


def heading(args: argparse.Namespace, scale: int, batch: dict[str, torch.Tensor]) -> str:
    """What the table of a scale is about, and what is not in it."""
    count, _, height, width = batch["lq"].shape
    text = (
        f"x{scale} on {args.device}, batch {count}, LR patches {height} x {width}; medians (least to most) of "
        f"{args.rounds} rounds of {args.steps}. First step: with compilation. Loss: of step {WARM_UP}."
    )
    if args.device == "cuda":
        return f"{text} Memory: most allocated in a step, by this setting alone."
    text += " Memory: most resident in a process of its own, without what it had before the first step."
    text += " flex is not measured: it has no backward pass on the CPU, and `sdpa` is used instead."
    return text if args.compile else f"{text} Nor is compile, which takes minutes for each setting: add --compile."


def table(trials: Sequence[Trial], images: int) -> str:
    """Markdown; ratios are medians of those of each round."""
    baselines = [trial for trial in trials if trial.setting.label in ("fp32 naive", "fp32 flex")]
    against = [f"against {trial.setting.label}" for trial in baselines]
    head = ["setting", "first step, s", "step, ms", "images/s", *against, "MiB", "loss"]
    return markdown(head, [[trial.setting.label, *cells(trial, baselines, images)] for trial in trials])


def cells(trial: Trial, baselines: Sequence[Trial], images: int) -> Iterator[str]:
    yield "-" if trial.first_step is None else f"{trial.first_step:.1f}"
    if trial.failure is not None or not trial.seconds:
        yield trial.failure or "-"
        yield from ["-"] * (len(baselines) + 1)
    else:
        median, least, most = statistics.median(trial.seconds), min(trial.seconds), max(trial.seconds)
        digits = 0 if median > 1 else 1
        yield f"{median * 1e3:.{digits}f} ({least * 1e3:.{digits}f} to {most * 1e3:.{digits}f})"
        yield f"{images / median:.3g}"
        yield from (ratio(trial, baseline) for baseline in baselines)
    yield "-" if trial.memory is None else f"{trial.memory / MIB:.0f}"
    yield "-" if trial.loss is None else f"{trial.loss:.4f}"


def ratio(trial: Trial, baseline: Trial) -> str:
    """How many times as fast."""
    if baseline.failure is not None:
        return "-"
    return f"{statistics.median(b / a for a, b in zip(trial.seconds, baseline.seconds, strict=True)):.2f}"


if __name__ == "__main__":
    main()
