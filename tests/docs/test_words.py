"""Rules on words and sizes that ruff has no rule for, for each folder of source code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
MAX_COLUMNS = 100
BARE = re.compile(r"(What|Whether|Who|Of|By|That|For)\b")
"""First words of a docstring that is no sentence and does not name its subject."""

Body = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def folders() -> list[Path]:
    """Return the folders that hold source files, each of which is a case of its own."""
    roots = (ROOT / "src", ROOT / "examples", ROOT / "benchmarks", ROOT / "scripts")
    files = (path for root in roots for path in root.rglob("*.py"))
    return sorted({path.parent for path in files if "__pycache__" not in path.parts})


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring, those of attributes and constants included."""
    for node in ast.walk(tree):
        if not isinstance(node, Body):
            continue

        for statement in node.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, text


def bare_docstrings(source: str) -> list[str]:
    """Return line and beginning of every docstring that begins with one of the `BARE` words."""
    found = docstrings(ast.parse(source))
    return [f"{line}: {text[:50]!r}" for line, text in found if BARE.match(text.lstrip())]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("folder", folders(), ids=named)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: Path) -> None:
    bare = [
        f"{named(path)}:{docstring}"
        for path in sorted(folder.glob("*.py"))
        for docstring in bare_docstrings(path.read_text(encoding="utf-8"))
    ]
    assert not bare, "\n".join(["name the subject, or begin with a verb:", *bare])


@pytest.mark.parametrize("folder", folders(), ids=named)
def test_files_and_lines_are_short(folder: Path) -> None:
    long = []
    for path in sorted(folder.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_LINES:
            long.append(f"{named(path)}: {len(lines)} lines; split it by idea")

        long += [
            f"{named(path)}:{number}: {len(line)} columns"
            for number, line in enumerate(lines, start=1)
            if len(line) > MAX_COLUMNS
        ]

    assert not long, "\n".join([f"at most {MAX_LINES} lines of {MAX_COLUMNS} columns:", *long])


def test_the_rule_finds_docstrings_of_all_kinds() -> None:
    source = '''
"""What the module does."""

LIMIT = 3
"""Of a list."""
WORDS = """For a user."""


class Site:
    """A site."""

    name: str
    """Whether it has one."""

    def start(self) -> None:
        """
        That starts it.
        """
        """Forty is no bare word."""


async def stop() -> None:
    """By a signal."""
'''
    lines = [docstring.partition(":")[0] for docstring in bare_docstrings(source)]
    assert sorted(map(int, lines)) == [2, 5, 13, 16, 23]
