"""`basicsr doctor`: what to paste into a bug report; see `esc_arch.tools.doctor`."""

from __future__ import annotations

from esc_arch.tools.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
