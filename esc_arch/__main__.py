"""`python -m esc_arch VERB` is `basicsr VERB`; so is `torchrun -m esc_arch VERB`."""

import sys

from esc_arch.cli import main

if __name__ == "__main__":
    sys.exit(main())
