"""Results of autotuning: their file in the user's cache, and what `auto` makes of them.

There is a file for each GPU, version of PyTorch and of Triton, and state of the kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from esc_arch.ops import cache as user_cache
from esc_arch.ops.compiling import constant_when_compiled
from esc_arch.ops.operation import SampleShapes, Size

logger = logging.getLogger(__name__)

FORMAT = "2"

#: How kernels multiply: float32 with all its bits and in TF32, and the half types.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MODES = ("inference", "training")


@dataclass(frozen=True)
class Network(SampleShapes):
    """Shapes of a network that backends are tried with.

    Attributes:
        small: what results are compared on: no multiple of the window, and few enough windows for float64.
        image, patches: what inference and training are timed on. What PyTorch keeps of the scores of all patches for
            their gradients must fit into 4 GB.
    """

    small: Size = (2, 35, 45)
    image: Size = (1, 180, 320)
    patches: Size = (4, 64, 64)


NETWORKS = {
    "ESC": Network(),
    "ESC-XL": Network(192, 12, 48, 48, 13, 240, small=(1, 41, 30), image=(1, 96, 144), patches=(1, 96, 96)),
}


def nearest(*, channels: int = 0, pdim: int = 0) -> str:
    """The network of `NETWORKS` nearest to one with these channels, or these channels that ConvAttn convolves."""
    # (Compared with numbers only, so that torch.compile can trace it, where these may be symbols)
    return "ESC" if channels <= 128 and pdim <= 32 else "ESC-XL"


class Case(NamedTuple):
    """What is tried.

    Attributes:
        operation, backend: such as window attention and triton.
        network: a key of `NETWORKS`, whose shapes it is tried with.
        precision: a key of `PRECISIONS`.
        mode: one of `MODES`; training includes the gradients.
    """

    operation: str
    backend: str
    network: str
    precision: str
    mode: str


@dataclass(frozen=True)
class TrialResult:
    """What was found.

    Attributes:
        failure: why the backend must not be taken; empty where it is exact.
        part: what the errors are of: the result, or the gradient, that is nearest to its limit.
        error, plain_error: largest difference from float64 of the backend and of plain PyTorch in the same precision.
        baseline: the backend that auto would take otherwise.
        milliseconds: by layout of the map, medians of the backend and of the baseline.
    """

    failure: str = ""
    part: str = ""
    error: float | None = None
    plain_error: float | None = None
    baseline: str = ""
    milliseconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def least_gain(self) -> Sequence[float]:
        """The two times, in the layout in which the backend gains least."""
        return min(self.milliseconds.values(), key=lambda times: times[1] / times[0])

    @property
    def slower(self) -> str:
        """Why it is no gain; empty where it is the faster one in every layout."""
        own, other = self.least_gain
        return "" if own < other else f"slower than {self.baseline} here ({own:.3g} against {other:.3g} ms)"

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED, {self.failure}"
        own, other = self.least_gain
        speed = "faster" if not self.slower else "slower"
        return (
            f"exact (error {self.error:.1e}, plain PyTorch {self.plain_error:.1e}), {speed}: {own:.3g} against "
            f"{other:.3g} ms of {self.baseline}"
        )


@constant_when_compiled
def auto_skip_reasons(
    operation: str, network: str, dtype: torch.dtype, tf32: bool, training: bool, device: str, index: int | None
) -> list[str]:
    """Why `auto` does not take the Triton kernels of an operation; empty where they were found exact and faster.

    Args:
        operation, network: names, see `Case`.
        dtype, tf32: of the numbers, and if those of float32 are multiplied as TF32.
        device, index: type and number of the device that the inputs are on.
    """
    if device == "cpu":
        return ["on a CPU its kernels are interpreted, for tests alone"]
    switch = os.environ.get("ESC_ARCH_TRITON")
    if switch == "1":
        return []
    if switch == "0":
        return ["ESC_ARCH_TRITON=0 keeps auto from it"]
    precision = "tf32" if tf32 and dtype is torch.float32 else str(dtype).removeprefix("torch.")
    results = load(device, index)
    result = results.get(Case(operation, "triton", network, precision, MODES[training]))
    if result is None:
        if not results:
            _advise()
        return ["not tried on this GPU yet: `basicsr warmup` tries it"]
    if result.failure:
        return [f"failed its trial on this GPU: {result.failure}; `basicsr warmup --again` tries it again"]
    return [result.slower] if result.slower else []


@cache
def _advise() -> None:
    """Once in a process."""
    logger.info("There are faster kernels for this GPU, not tried on it yet: `basicsr warmup` tries them.")


def file_of(device: torch.device) -> Path:
    """Where the results on a device are kept; another name for all that they depend on.

    Raises:
        ImportError: of triton, which is there and broken.
    """
    text = json.dumps(_key(device), sort_keys=True)
    return user_cache.cache_folder() / f"autotune-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def save(device: torch.device, results: Mapping[Case, TrialResult]) -> None:
    """Write their file.

    Raises:
        OSError: it cannot be written.
    """
    records = [case._asdict() | asdict(result) for case, result in results.items()]
    data = json.dumps({"key": _key(device), "results": records}, indent=1)
    user_cache.write(file_of(device), data.encode())
    load.cache_clear()


@cache
def load(kind: str, index: int | None) -> dict[Case, TrialResult]:
    """The results on the device of this type and number; none, with a warning, where their file cannot be read."""
    try:
        file = file_of(torch.device(kind) if index is None else torch.device(kind, index))
        return dict(_decode(record) for record in json.loads(user_cache.read(file))["results"])
    except FileNotFoundError:
        return {}
    except ImportError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror or error}"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        problem = f"{file} is damaged"
    logger.warning("Autotune results of the Triton kernels: %s. `basicsr warmup` tries them again.", problem)
    return {}


def _decode(record: dict[str, Any]) -> tuple[Case, TrialResult]:
    case = Case(*(str(record.pop(name)) for name in Case._fields))
    result = TrialResult(**record)
    if not result.failure:
        # What is not a number, or not there, is found out here and not where a network runs
        str(result), result.slower
    return case, result


def _key(device: torch.device) -> dict[str, str]:
    """All that results depend on."""
    versions = {"format": FORMAT, "torch": torch.__version__, "triton": _triton(), "kernels": _digest()}
    return {**_hardware(device), **versions}


def _hardware(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device": device.type, "capability": ""}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}


def _triton() -> str:
    try:
        import triton

        return str(triton.__version__)
    except Exception as error:  # of a driver or a library that it loads, too: auto has other backends
        raise ImportError(f"triton cannot be imported: {error}") from error


@cache
def _digest() -> str:
    sources = sorted(Path(__file__).parents[1].rglob("triton*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
