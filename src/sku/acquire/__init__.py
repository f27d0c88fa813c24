"""Stage 1, harmful knowledge acquisition: three modules, one trainer."""
