"""`basicsr benchmark`: the paper's tables, a sub-command each."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run a sub-command; returns the exit status."""
    return int(importlib.import_module(f"esc_arch.tools.benchmark.{args.part}").run(args))
