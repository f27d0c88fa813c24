"""The one training loop of all methods, and what a method tells it."""
