"""Tests of deployments over Flower, with failures and certificates."""
