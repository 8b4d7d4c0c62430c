"""Collections, runs, metrics and their comparison."""
