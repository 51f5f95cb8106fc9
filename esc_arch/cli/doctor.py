"""`basicsr doctor`: what to paste into a bug report; see `esc_arch.tools.doctor`."""

from __future__ import annotations

from esc_arch.tools.doctor.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
