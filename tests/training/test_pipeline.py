"""What a run of BasicSR's pipelines begins with."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from esc_arch.ops.cpu import background
from esc_arch.training import pipeline


@pytest.mark.parametrize(
    ("num_gpu", "network", "flags", "built"),
    [
        (0, "ESC", {"no_build": False}, True),
        (0, "esc_arch.ESCFP", {"no_build": False}, True),
        (0, "ESC", {"no_build": True}, False),
        (0, "ESC", {}, False),
        (0, "RRDBNet", {"no_build": False}, False),
        (1, "ESC", {"no_build": False}, False),
    ],
)
def test_operators_are_built_before_a_run_of_our_networks_on_a_cpu(
    num_gpu: int, network: str, flags: dict[str, Any], built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, calls = {"num_gpu": num_gpu, "network_g": {"type": network}}, []
    monkeypatch.setattr(pipeline.options, "parse_options", lambda root, is_train, args: (opt, args))
    monkeypatch.setattr(background, "build_first", calls.append)
    assert pipeline._parse_options(".", True, argparse.Namespace(**flags))[0] is opt
    assert bool(calls) == built
