"""A grid of runs from one recipe: resumable, one table, one report."""
