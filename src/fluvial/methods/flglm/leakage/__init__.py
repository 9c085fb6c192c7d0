"""Leakage of split learning: noise on hidden states, attacks on them, and their meter."""
