"""Equalities with something simpler or independent; tolerance is zero unless a comment says why."""
