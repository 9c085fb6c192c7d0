"""docs/security.md names tests that exist."""

import ast
import re

from tests.support import ROOT

PAGE = ROOT / "docs" / "security.md"
NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_the_page_names_exists() -> None:
    named = NAME.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    tests: dict[str, set[str]] = {}

    for file, name in named:
        if file not in tests:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            tests[file] = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}

        assert name in tests[file], f"{file}::{name}"


def test_every_promise_names_a_test() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    promises = [
        line
        for line in lines
        if line.startswith("|") and not line.startswith(("|---", "| promised"))
    ]
    assert promises

    for line in promises:
        assert NAME.search(line), line
