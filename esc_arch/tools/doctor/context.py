"""What the doctor was asked, and what its sections share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from .subprocess_worker import Worker

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """One for a run of the doctor.

    Attributes:
        args: the command's arguments, see `command.add_arguments`.
        import_failure: why `import esc_arch` failed, in one line; empty where it did not.
        worker: for work that may crash or hang.
        tell: shows what is at work, where somebody is looking.
    """

    args: argparse.Namespace
    import_failure: str
    worker: Worker
    tell: Callable[[str], None]
