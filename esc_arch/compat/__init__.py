"""The one place that knows what basicsr 1.4.2 needs to run, safely, on current libraries.

Importing esc_arch calls, in this order,

 - :func:`prepare_import`, before basicsr is imported: stand-ins for modules that newer libraries dropped, and
   warnings when it is unclear which of several copies of BasicSR runs, or when BasicSR's own script does;
 - :func:`apply_patches`, after it: replacements for functions of basicsr 1.4.2 that fail.

Nothing in site-packages is edited, and nothing changes what a working BasicSR experiment computes.
"""

from __future__ import annotations

from .aliases import add_missing_modules
from .duplicate_installs import forget_failed_import, warn_about_copies, warn_about_script
from .patches import PATCHES, apply_patches

__all__ = ["PATCHES", "apply_patches", "prepare_import"]


def prepare_import() -> None:
    """Make ``import basicsr`` possible with the installed torch, torchvision, SciPy and Python."""
    forget_failed_import()
    warn_about_copies()
    warn_about_script()
    add_missing_modules()
