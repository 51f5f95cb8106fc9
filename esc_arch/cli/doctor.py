"""`basicsr doctor`: what to paste into a bug report; see `esc_arch.doctor`."""

from __future__ import annotations

from esc_arch.doctor.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
