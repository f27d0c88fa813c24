"""Attacks on an unlearned model: what it takes to get the forgotten answers back."""
