"""Tests of the choice of alpha."""
