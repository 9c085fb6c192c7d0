"""Flower: the same run over processes and machines. Only this folder imports flwr."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of Flower's programs: no telemetry, no question to a hub."""
OUT_OF_STEP = 75
"""Exit code of the process that answers for a site when its SuperNode must be started again."""
