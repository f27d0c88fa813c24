"""Alpha chosen by data: many strengths on one model in memory, a rule, and the frontier that it chose from."""
