"""`basicsr doctor`: what to paste into a bug report; see `esc_arch.tools.doctor`."""

from __future__ import annotations

from esc_arch.tools.doctor.command import run

__all__ = ["run"]
