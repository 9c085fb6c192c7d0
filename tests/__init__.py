"""Tests of the package, its documents and its benchmarks."""
