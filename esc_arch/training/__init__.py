"""What a training needs beyond BasicSR's loop: exact data order, states, stopping, progress, choices by name."""

from contextlib import suppress

with suppress(ModuleNotFoundError):  # some modules need none
    import basicsr  # noqa: F401  first: what comes with it imports modules of this package
