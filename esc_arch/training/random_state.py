"""The random number generators of a process: Python's, NumPy's, and PyTorch's on the CPU and the GPUs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "restore", "seeded"]


def capture() -> dict[str, Any]:
    """The state of all generators, in plain numbers, which processes can exchange and safe loading takes."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": [each.tolist() for each in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Restore what `capture` returned; GPUs that are not here are left out."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    of_numpy = state["numpy"]
    inner = {"key": np.array(of_numpy["state"]["key"], np.uint32), "pos": of_numpy["state"]["pos"]}
    np.random.set_state(of_numpy | {"state": inner})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(of_device, dtype=torch.uint8), device)


@contextmanager
def seeded(*entropy: int, put_back: bool) -> Iterator[None]:
    """Seed the generators of the CPU from non-negative numbers; `put_back` restores them afterwards."""
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if put_back else None
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.random.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed the GPUs as well
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
