"""Shared by all tests. esc_arch comes first: it makes basicsr importable."""

import esc_arch  # noqa: F401
