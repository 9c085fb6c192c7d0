"""Flower: the same run over processes and machines. Only this folder imports flwr."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of Flower's programs: no telemetry, no question to a hub."""
