"""What the benchmarks share: the machine and its ceilings, timing in turns, memory, precisions, tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import esc_arch  # isort: skip  makes basicsr importable
import torch
from torch import nn

from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops import cpu
from esc_arch.ops.dispatch import OPERATIONS
from esc_arch.ops.float32 import float32_products

MIB = 2**20
#: Glibc's settings that keep freed memory instead of giving it back and faulting it in again.
RETAINED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
#: Calls of a round last at least so long together, in seconds: measuring has a cost of its own.
LEAST_ROUND = 0.02
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

Call = Callable[[], Any]
Context = Callable[[], AbstractContextManager[Call]]


# --- what is compared -----------------------------------------------------------------------------------------------


@contextmanager
def choosing(orders: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Let `auto` try only these backends, by operation, whatever their trials say; the others are left as they are."""
    with ExitStack() as stack:
        for name, order in orders.items():
            operation = OPERATIONS[name]
            stack.enter_context(mock.patch.object(operation, "order", tuple(order)))
            for backend in (operation.backends[each] for each in order):
                if hasattr(backend, "auto_skip_reasons"):
                    stack.enter_context(mock.patch.object(backend, "auto_skip_reasons", lambda *_: []))
        yield


@contextmanager
def layout_as_given() -> Iterator[None]:
    """Without the change to channels_last that networks make by themselves on a CPU."""
    with mock.patch("esc_arch.archs.base.fast_layout", lambda x: x):
        yield


def plain_orders() -> dict[str, tuple[str, ...]]:
    """The readable reference of every operation, which is the first in its table."""
    return {name: (next(iter(operation.backends)),) for name, operation in OPERATIONS.items()}


def set_attention(net: nn.Module, backend: str) -> None:
    """Change how a network's attention is computed, in place."""
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = backend


@contextmanager
def plain_operations(net: nn.Module) -> Iterator[None]:
    """Every operation of the network by its readable reference; its attention stays so."""
    set_attention(net, "auto")
    with choosing(plain_orders()):
        yield


@contextmanager
def tf32_of(precision: str) -> Iterator[None]:
    """TF32 for `tf32` alone; `default` leaves what PyTorch does when nobody says anything."""
    if precision == "default":
        yield
        return
    with float32_products(tf32=precision == "tf32"):
        yield


def dtype_of(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def precisions_of(device: str) -> tuple[str, ...]:
    """What a device computes in hardware: CPUs have no TF32, and PyTorch's fp16 on them is a conversion to and fro."""
    return PRECISIONS if device == "cuda" else ("fp32", "bf16")


def prepare_operators() -> str:
    """Build the C++ operators where that can be; says how long it took, or why not."""
    try:
        return f"C++ operators ready after {cpu.build():.1f} s"
    except RuntimeError as error:
        return str(error)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """What was measured of a setting; `failure` says why there is no more, and `refusal` that it cannot be here."""

    label: str
    first: float | None = None
    memory: int | None = None
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    failure: str | None = None
    refusal: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def runs(self) -> bool:
        return self.failure is None and self.refusal is None

    def attempt(self, action: Callable[[], None]) -> None:
        """What fails must not cost the figures of the others."""
        if not self.runs:
            return
        try:
            action()
        except Exception as error:
            text = str(error)
            if isinstance(error, RuntimeError) and "cannot run here" in text:
                self.refusal = text.split("cannot run here.")[1].split(". Use ")[0].strip()
            elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
                self.failure = "out of memory"
            else:
                self.failure = f"{type(error).__name__}, see above"
                traceback.print_exc()
        if not self.runs:  # after the exception, whose frames hold tensors
            release_memory()

    def as_record(self) -> dict[str, Any]:
        return {**vars(self), "median": self.median}


def take_turns(trials: Sequence[Trial], contexts: Sequence[Context], rounds: int) -> None:
    """Time the calls of all trials in turns, so that all see the same machine.

    A context of a trial gives its call. Ratios are of the same round: a trial that fails in one has no figures at all.
    """
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for trial, context in zip(trials, contexts, strict=True):
            trial.attempt(lambda trial=trial, context=context: _take_turn(trial, context))  # type: ignore[misc]
    for trial in trials:
        if not trial.runs:
            trial.seconds.clear()


def _take_turn(trial: Trial, context: Context) -> None:
    with context() as call:
        trial.seconds.append(timed(call, trial.calls))


def timed(call: Call, count: int = 1) -> float:
    """Seconds of a call, in the middle of `count`."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def warm_up(trial: Trial, call: Call) -> None:
    """The calls that compile, allocate, and choose kernels; then how many calls make a round."""
    seconds = timed(call)
    trial.first = trial.first or seconds
    if seconds < 1 or torch.cuda.is_initialized():  # what is long is a call that need not be made again
        seconds = timed(call)
    trial.calls = enough_calls(seconds)


def enough_calls(seconds: float) -> int:
    """So many that a round lasts `LEAST_ROUND`."""
    return max(1, round(LEAST_ROUND / seconds))


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def gpu_peak(call: Call) -> int:
    """The most bytes that a call has allocated at a time, beyond what was there before."""
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(call: Call) -> int | None:
    """The most bytes that this process has had during a call, beyond what it had before; None where unknown."""
    with suppress(OSError):  # where it fails, it is counted from the highest so far
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = high_water()
    call()
    after = high_water()
    return None if before is None or after is None else after - before


def high_water() -> int | None:
    """Linux only; getrusage would have what the parent process had at its highest."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def limit_own_memory() -> None:
    """Let allocations beyond what the machine has free fail, instead of the kernel ending this or another process."""
    try:
        import resource

        free = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + int(0.9 * free),) * 2)
    except (ImportError, OSError, StopIteration, ValueError):
        pass  # not Linux


def measure_in_own_process(trial: Trial, script: str, arguments: Sequence[str]) -> None:
    """Fill in the memory and the first call of a trial on the CPU.

    In one process the settings share its memory, and what does not fit would end it. `script` is called with
    `arguments`, and prints what `report_own_process` makes in its last line.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        trial.failure = "out of memory" if done.returncode < 0 else "failed, see above"
        return
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        setattr(trial, name, value)


def report_own_process(trial: Trial, context: Context, small: Call) -> None:
    """Measure what `measure_in_own_process` asks for, and print it.

    Args:
        context: gives the call that is measured.
        small: a call of the same kind with little memory, which compiles and loads what both need.
    """
    limit_own_memory()

    def measure() -> None:
        start = time.perf_counter()
        with context() as call:
            small()
            trial.memory = resident_peak(call)
        trial.first = time.perf_counter() - start

    trial.attempt(measure)
    print(json.dumps({name: getattr(trial, name) for name in ("memory", "first", "failure", "refusal")}))


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Not a number when one is not finite."""
    return (actual.detach().double() - expected.detach().double()).abs().max().item()


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value of a size that keeps features near 1: an untrained ESC hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and not name.endswith("relative_position_bias"):
            value *= parameter[0].numel() ** -0.5
        elif parameter.dim() == 1:
            value = 0.3 * value + name.endswith("weight")  # the weights of one dimension are those of LayerNorms
        parameter.copy_(value)
    return net


# --- the machine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at its best: bytes/s of a copy (read and written), multiply-adds/s of a matrix product."""

    bandwidth: float
    multiply_adds: dict[str, float]

    def least_seconds(self, multiply_adds: int, numbers: int, precision: str) -> float:
        """The roofline: arithmetic and memory at once, each at its ceiling."""
        precision = "tf32" if precision == "default" else precision
        size = 4 if precision in ("fp32", "tf32") else 2
        return max(multiply_adds / self.multiply_adds[precision], numbers * size / self.bandwidth)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.multiply_adds.items())
        return f"copy {self.bandwidth / 1e9:.1f} GB/s (read + written), G multiply-adds/s of a matrix product: {rates}"


def measure_ceilings(device: str, quick: bool) -> Ceilings:
    """Medians of five; `quick` uses sizes that fit into caches, so that a test ends soon."""
    progress("ceilings")
    side = 128 if quick else 8192 if device == "cuda" else 3072
    length = (2**20 if quick else 2**28 if device == "cuda" else 2**26) // 4
    source, target = torch.rand(length, device=device), torch.empty(length, device=device)
    copying = _seconds_of(lambda: target.copy_(source))
    rates = {}
    for precision in precisions_of(device):
        a, b = (torch.randn(side, side, device=device).to(dtype_of(precision)) for _ in range(2))
        with tf32_of(precision):
            rates[precision] = side**3 / _seconds_of(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return Ceilings(2 * source.nbytes / copying, rates)


def _seconds_of(call: Call) -> float:
    count = enough_calls(max(timed(call), timed(call)))
    return statistics.median(timed(call, count) for _ in range(5))


def machine(device: str) -> str:
    """Versions, and what the figures depend on."""
    parts = [f"Python {platform.python_version()}, torch {torch.__version__}, esc_arch {esc_arch.__version__}"]
    parts += [f"{name} {found}" for name in ("triton", "flash-attn", "basicsr") if (found := installed(name))]
    if device == "cuda":
        parts.append(
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}"
        )
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    parts.append(f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {threads}")
    prefixes = ("MALLOC_", "PYTORCH_ALLOC", "PYTORCH_CUDA_ALLOC", "LD_PRELOAD", "OMP_", "KMP_", "ESC_ARCH_")
    chosen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    parts.append(f"allocator and threads from the environment: {' '.join(chosen) or 'nothing (default)'}")
    parts.append(f"load average at the start: {os.getloadavg()[0]:.1f}")
    return "; ".join(parts)


def installed(package: str) -> str | None:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# --- the command line -----------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 5 on a CPU")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings whose names contain one of these")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it works")
    parser.add_argument("--both-allocators", action="store_true", help="on a CPU: with the heap retained, and without")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there, too")
    parser.add_argument("--of-own-process", metavar="LABEL", help=argparse.SUPPRESS)


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the machine."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.rounds = args.rounds or (2 if args.quick else 20 if args.device == "cuda" else 5)


def size(text: str) -> tuple[int, int]:
    """1280x720 as rows and columns, (720, 1280)."""
    width, height = map(int, text.split("x"))
    return height, width


@contextmanager
def fresh_compilation() -> Iterator[None]:
    """What is compiled is compiled for the first time; and all of it, though torch counts the settings together."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        folders = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        with mock.patch.dict(os.environ, folders), torch._dynamo.config.patch(recompile_limit=64):
            yield


def describe(args: argparse.Namespace) -> tuple[dict[str, Any], Ceilings]:
    """Print what the figures depend on; returns it as the beginning of what --json writes, and the ceilings."""
    about, operators = machine(args.device), prepare_operators()
    ceilings = measure_ceilings(args.device, args.quick)
    print(f"{about}; {operators}\n\nCeilings: {ceilings}", flush=True)
    return {"machine": about, "operators": operators, "ceilings": vars(ceilings), "tables": []}, ceilings


def keep(record: dict[str, Any], table: dict[str, Any], file: Path | None) -> None:
    """Add a table to what --json writes, at once: what was measured stays when a later one fails."""
    record["tables"].append(table)
    if file is not None:
        file.write_text(json.dumps(record, indent=1))


def run_with_both_allocators(script: str, argv: Sequence[str], file: Path | None) -> int:
    """Run `script` twice, in processes of their own, and gather what both write as JSON; returns the exit status."""
    arguments = [argument for argument in argv if argument != "--both-allocators"]
    gathered, status = {}, 0
    for name, settings in (("R (heap retained)", RETAINED), ("D (default allocator)", {})):
        print(f"\n## {name}\n", flush=True)
        environment = {key: value for key, value in os.environ.items() if key not in RETAINED} | settings
        own = None if file is None else file.with_name(f"{file.name}.{name[0]}")
        command = [sys.executable, script, *arguments, *(["--json", str(own)] if own else [])]
        status = subprocess.run(command, env=environment, check=False).returncode or status
        if own is not None and own.exists():
            gathered[name[0]] = json.loads(own.read_text())
            own.unlink()
    if file is not None:
        file.write_text(json.dumps(gathered, indent=1))
    return status


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- telling --------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(seconds: Sequence[float]) -> str:
    """Milliseconds: the median, and from the least to the most."""
    median = statistics.median(seconds)
    digits = 0 if median >= 1 else 1 if median >= 0.1 else 3
    return " ".join(
        form.format(f"{value * 1e3:.{digits}f}")
        for form, value in (("{}", median), ("({}", min(seconds)), ("to {})", max(seconds)))
    )


def times_as_fast(trial: Trial, baseline: Trial) -> str:
    """The median of the ratios of each round."""
    if not trial.seconds or not baseline.seconds:
        return "-"
    return f"{statistics.median(b / a for a, b in zip(trial.seconds, baseline.seconds, strict=True)):.2f}"


#: Of the tables of latency; what `cells` gives.
HEAD = ("setting", "first, s", "ms", "against naive", "against flex", "MiB", "error", "roofline, ms", "of roofline")


def cells(trial: Trial, baselines: Sequence[Trial], least: float) -> list[str]:
    """A line of the table: `baselines` are the two that it is compared with, `least` the roofline in seconds."""
    median = trial.median
    return [
        trial.label,
        number(trial.first, ".1f"),
        spread(trial.seconds) if trial.seconds else trial.failure or "-",
        *(times_as_fast(trial, baseline) for baseline in baselines),
        "-" if trial.memory is None else f"{trial.memory / MIB:.0f}",
        number(trial.error, ".1e"),
        f"{least * 1e3:.3g}",
        "-" if median is None else f"{least / median:.0%}",
    ]


def latency_table(trials: Sequence[Trial], baselines: Sequence[str], bounds: Sequence[float]) -> str:
    """Of the trials that can be here; then which cannot, and why."""
    compared = [next(trial for trial in trials if trial.label == label) for label in baselines]
    pairs = [(trial, least) for trial, least in zip(trials, bounds, strict=True) if trial.refusal is None]
    refused: dict[str, list[str]] = {}
    for trial in trials:
        if trial.refusal is not None:
            refused.setdefault(trial.refusal, []).append(trial.label)
    reasons = [f"- {' / '.join(labels)}. {reason}" for reason, labels in refused.items()]
    table = markdown(HEAD, (cells(trial, compared, least) for trial, least in pairs))
    return "\n".join([table, "\nNot here:\n", *reasons]) if reasons else table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
