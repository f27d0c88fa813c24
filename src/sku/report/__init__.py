"""Report: pictures and tables from recorded results; no torch here."""
