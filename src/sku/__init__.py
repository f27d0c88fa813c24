"""Selective Knowledge negation Unlearning for language models."""
