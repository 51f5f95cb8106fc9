"""`python -m esc_arch VERB` is `basicsr VERB`; so is `torchrun -m esc_arch VERB`."""

import sys

if __name__ == "__main__":
    # Spawned worker processes import the main module only if it seems to be a file (fault 5), and need esc_arch
    sys.modules[__name__].__spec__ = None

from esc_arch.cli import main

if __name__ == "__main__":
    sys.exit(main())
