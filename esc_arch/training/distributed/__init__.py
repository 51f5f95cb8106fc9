"""Several processes that train one network: who started them, joining them, agreeing, and failing together."""

from __future__ import annotations

from .agreement import Agreement, gather_objects, wait_for_all
from .failures import failing_together
from .launch import init_dist, print_note, resolve_launcher, take_notes
from .watcher import expect_progress, progress

__all__ = [
    "Agreement",
    "expect_progress",
    "failing_together",
    "gather_objects",
    "init_dist",
    "print_note",
    "progress",
    "resolve_launcher",
    "take_notes",
    "wait_for_all",
]
