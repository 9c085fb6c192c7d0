"""The cases of tests that the default suite leaves to `make test-slow`: see slow.toml."""

import tomllib
from pathlib import Path

Cases = dict[str, list[str]]
_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
STAY: Cases = _TABLES["stay"]
"""Cases that stay by "file::test", where all others of the test are slow."""
LEAVE: Cases = _TABLES["leave"]
"""Cases that are slow by "file::test", where all others of the test stay."""


def is_slow(test: str, case: str) -> bool:
    """Return whether a case of "file::test", "" where it has none, is slow."""
    return case in LEAVE.get(test, ()) or (test in STAY and case not in STAY[test])
