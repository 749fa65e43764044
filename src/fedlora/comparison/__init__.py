"""Grids of runs set side by side."""
