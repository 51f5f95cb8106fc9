"""Results of autotuning, and their file in the user's cache.

There is a file for each GPU, version of PyTorch and of Triton, and state of the kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from esc_arch.atomic_io import write_atomically
from esc_arch.ops.cpu import building

__all__ = ["MODES", "PRECISIONS", "Case", "TrialResult", "file_of", "load", "save"]

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


def file_of(device: torch.device) -> Path:
    """Where the results on a device are kept; another name for all that they depend on.

    Raises:
        ImportError: of triton, which is there and broken.
    """
    text = json.dumps(_key(device), sort_keys=True)
    return building.cache_folder() / f"autotune-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def save(device: torch.device, results: Mapping[Case, TrialResult]) -> None:
    """Write their file.

    Raises:
        OSError: it cannot be written.
    """
    records = [case._asdict() | asdict(result) for case, result in results.items()]
    file = file_of(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"key": _key(device), "results": records}, indent=1).encode())
    load.cache_clear()


@cache
def load(kind: str, index: int | None) -> dict[Case, TrialResult]:
    """The results on the device of this type and number; none, with a warning, where their file cannot be read."""
    try:
        file = file_of(torch.device(kind) if index is None else torch.device(kind, index))
        return dict(_decode(record) for record in json.loads(file.read_bytes())["results"])
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
