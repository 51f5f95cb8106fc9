"""Several processes that train one network: who started them, joining them, agreeing, and failing together."""

from __future__ import annotations

from .collectives import Agreement, gather_objects, wait_for_all
from .failure_monitor import expect_progress, progress
from .failures import abort_all_ranks
from .launch import init_dist, print_note, resolve_launcher, take_notes

__all__ = [
    "Agreement",
    "abort_all_ranks",
    "expect_progress",
    "gather_objects",
    "init_dist",
    "print_note",
    "progress",
    "resolve_launcher",
    "take_notes",
    "wait_for_all",
]
