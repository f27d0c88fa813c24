"""Command line: torch is imported only when a command runs."""
