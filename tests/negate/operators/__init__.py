"""Tests of the operators on a task vector."""
