"""The benchmark of split learning's leakage: tokens that a server reads, by noise and cut."""
