"""Batteries of faults."""
