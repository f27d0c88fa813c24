"""Command line: one command per file, torch imported only when one runs."""
