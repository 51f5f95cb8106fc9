"""The one place that knows what basicsr 1.4.2 needs to run, safely, on current libraries.

With esc_arch imported, ``import basicsr`` begins with :func:`prepare_import` and ends with :func:`apply_patches`.
Nothing in site-packages is edited, and nothing changes what a working BasicSR experiment computes.
"""

from __future__ import annotations

from .aliases import add_missing_modules
from .application import apply_patches
from .duplicate_installs import warn_about_copies, warn_about_script
from .patches import PATCHES

__all__ = ["PATCHES", "apply_patches", "prepare_import"]


def prepare_import() -> None:
    """Make ``import basicsr`` possible with the installed libraries; warn if it is unclear which BasicSR runs."""
    warn_about_copies()
    warn_about_script()
    add_missing_modules()
