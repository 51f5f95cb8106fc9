"""`basicsr train`: BasicSR's training pipeline."""

from __future__ import annotations

import argparse

import basicsr.train

from esc_arch.options import add_arguments
from esc_arch.training.pipeline import run_pipeline

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    return run_pipeline(basicsr.train, basicsr.train.train_pipeline, args)
