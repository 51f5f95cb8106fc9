"""`basicsr train`: BasicSR's training pipeline."""

from __future__ import annotations

import argparse

import basicsr.train

from esc_arch.training.pipeline import run_pipeline

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    return run_pipeline(basicsr.train, basicsr.train.train_pipeline, args)
