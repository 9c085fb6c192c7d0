"""Every message that docs/troubleshooting.md explains is one that Fluvial has."""

import ast
import re
from functools import cache

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)


@cache
def texts() -> tuple[str, ...]:
    """Return every text of the package's code, parts of f-strings included."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")]
    return tuple(
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_the_page_has_messages() -> None:
    assert len(MESSAGES) > 20
    assert len(MESSAGES) == len(set(MESSAGES))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_code(message: str) -> None:
    assert any(message in text for text in texts())
