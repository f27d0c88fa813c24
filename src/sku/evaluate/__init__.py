"""Evaluation: replies written once, every metric read from them."""
