"""Fixtures of the tests of FedCyBGD."""

from tests.support.fedcybgd import stage, task, watch
from tests.support.proxy import tiny

__all__ = ["stage", "task", "tiny", "watch"]
