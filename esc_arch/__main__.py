"""`python -m esc_arch VERB` is `basicsr VERB`; so is `torchrun -m esc_arch VERB`."""

import os
import sys

if __name__ == "__main__":
    # With -m Python looks first in the current folder, where anything may lie; a clone of this package may do so, too
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]
    # Spawned worker processes import the main module only if it seems to be a file (fault 5), and need esc_arch
    sys.modules[__name__].__spec__ = None

from esc_arch.cli import main

if __name__ == "__main__":
    sys.exit(main())
