"""Fixtures of the tests of FedCyBGD."""

from tests.support.fedcybgd import stage, task, watch
from tests.support.ledger import folder, pools, scene
from tests.support.proxy import tiny

__all__ = ["folder", "pools", "scene", "stage", "task", "tiny", "watch"]
