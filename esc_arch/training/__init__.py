"""What a training needs beyond BasicSR's loop: exact data order, states, stopping, progress, choices by name."""
