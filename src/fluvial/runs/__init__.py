"""The life of a run: its configuration, checkpoints, rounds, prediction and result."""
