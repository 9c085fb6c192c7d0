"""Fixtures of the tests of FedCyBGD."""

from tests.support.fedcybgd import stage, task, watch
from tests.support.ledger import benches, folder, scene
from tests.support.proxy import tiny

__all__ = ["benches", "folder", "scene", "stage", "task", "tiny", "watch"]
