"""The benchmark of quantised bases: memory and time of a step, and what merging would change."""
