"""Fixtures of the tests of FedCyBGD."""

from tests.support.fedcybgd import stage, task, watch

__all__ = ["stage", "task", "watch"]
