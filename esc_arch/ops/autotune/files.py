"""Verdicts in the user's cache: a file for each GPU, version of PyTorch and of Triton, and state of the kernels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from esc_arch.ops.cpu import building

from .verdicts import Subject, Verdict

__all__ = ["Loaded", "encode", "file_of", "load"]

FORMAT = 1

_OPS = Path(__file__).parents[1]
#: What the results of the kernels depend on.
_SOURCES = (
    _OPS / "triton_support.py",
    *(_OPS / "window_attention" / name for name in ("triton.py", "triton_kernels.py")),
    *(_OPS / "conv_attn" / name for name in ("triton.py", "triton_folded.py", "triton_kernels.py")),
)


class Loaded(NamedTuple):
    """The verdicts on a device, and why its file cannot be read; empty when it can, or there is none."""

    verdicts: dict[Subject, Verdict]
    problem: str


def file_of(device: torch.device) -> Path:
    """Where the verdicts on a device are kept; another name for all that they depend on.

    Raises:
        ImportError: of triton, which is there and broken.
    """
    text = json.dumps(_key(device), sort_keys=True)
    return building.cache_folder() / f"trials-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def encode(device: torch.device, verdicts: Mapping[Subject, Verdict]) -> bytes:
    """The content of their file."""
    records = [subject._asdict() | asdict(verdict) for subject, verdict in verdicts.items()]
    return json.dumps({"format": FORMAT, "key": _key(device), "verdicts": records}, indent=1).encode()


@cache
def load(kind: str, index: int | None) -> Loaded:
    """The verdicts on the device of this type and number; read once by a process, see `choice.forget`."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    try:
        file = file_of(device)
        content = file.read_bytes()
    except ImportError as error:
        return Loaded({}, str(error))
    except FileNotFoundError:
        return Loaded({}, "")
    except OSError as error:
        return Loaded({}, f"{file} cannot be read: {error.strerror or error}")
    try:
        return Loaded(_decode(content, _key(device)), "")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return Loaded({}, f"{file} is damaged")


def _decode(content: bytes, key: dict[str, str]) -> dict[Subject, Verdict]:
    """What `encode` made; nothing where it is of another key, and one of many errors where it is damaged."""
    found = json.loads(content)
    if found["format"] != FORMAT or found["key"] != key:
        return {}
    return dict(_read(dict(record)) for record in found["verdicts"])


def _read(record: dict[str, Any]) -> tuple[Subject, Verdict]:
    subject = Subject(*(str(record.pop(name)) for name in Subject._fields))
    verdict = Verdict(**record)
    if not verdict.failure:
        # What is not a number, or not there, is found out here and not where a network runs
        str(verdict), verdict.cost, verdict.slower
    return subject, verdict


def _key(device: torch.device) -> dict[str, str]:
    """All that verdicts depend on."""
    return {**_hardware(device), "torch": torch.__version__, "triton": _triton(), "kernels": _digest()}


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
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()
