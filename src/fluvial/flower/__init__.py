"""Runs over processes and machines with Flower; the only folder that imports flwr."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of Flower's programs without telemetry and without checks for updates."""
OUT_OF_STEP = 75
"""Exit code of a site's answering process when its SuperNode must be started again."""
