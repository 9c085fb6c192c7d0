"""The lists of methods and codecs are after each test of this folder as they were before it."""

from collections.abc import Iterator
from typing import Any

import pytest

from fluvial.codecs import CODECS
from fluvial.methods import METHODS
from fluvial.runs import own


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Remove the methods and codecs that a test enters; tests/contract covers every entry."""
    entries: tuple[dict[str, Any], ...] = (METHODS, CODECS)
    names = (own._OWN_METHODS, own._OWN_CODECS)
    entries_before = [dict(registry) for registry in entries]
    names_before = [set(owned) for owned in names]

    yield

    for registry, before in zip(entries, entries_before, strict=True):
        registry.clear()
        registry.update(before)
    for owned, before_names in zip(names, names_before, strict=True):
        owned.clear()
        owned.update(before_names)
