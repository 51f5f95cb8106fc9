"""Several processes that train one network: who started them, joining them, agreeing, and failing together."""

from .collectives import Agreement, gather_objects, wait_for_all
from .launch import abort_all_ranks, init_dist, print_note, resolve_launcher, take_notes

__all__ = [
    "Agreement",
    "abort_all_ranks",
    "gather_objects",
    "init_dist",
    "print_note",
    "resolve_launcher",
    "take_notes",
    "wait_for_all",
]
