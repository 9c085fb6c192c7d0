"""Helpers of the tests: folders, runs, models, deployments and references."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Root of the repository."""
GOLDEN = ROOT / "tests" / "golden"
"""Stored results that must never change."""
SHARED = ROOT.parent / "shared" / "data"
"""Data of a development checkout; tests that need it are skipped where it is absent."""
