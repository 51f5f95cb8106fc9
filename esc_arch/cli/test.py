"""`basicsr test`: BasicSR's test pipeline."""

from __future__ import annotations

import argparse

import basicsr.test

from esc_arch.training.pipeline import run_pipeline

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Test; returns the exit status."""
    return run_pipeline(basicsr.test, basicsr.test.test_pipeline, args)
