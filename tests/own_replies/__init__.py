"""Tests of the model's own replies."""
