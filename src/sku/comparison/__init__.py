"""Many methods, seeds and variants on the same data, loop and evaluator, one process at a time."""
