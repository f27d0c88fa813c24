"""Attacks on an unlearned model: what it takes to get the forgotten answers back. One attack a file."""
