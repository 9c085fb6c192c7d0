"""Comparisons: several configurations on the same data and seeds, and whether one is better."""
