"""Names of sites: they come from data and from peers, and are shown and stored everywhere."""

import re
from collections.abc import Iterable, Sequence

from fluvial.errors import ConfigError

LONGEST = 64
"""Most characters of a name."""
MOST_SHOWN = 20
"""Most names in a message."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Form of the name of a site with a process of its own; it is also a file's name and a key."""


def fault_of(name: str) -> str | None:
    """Return why a text cannot be a site's name, None where it can."""
    shown = repr(name[:60]) + (" ..." if len(name) > 60 else "")
    if not name.strip():
        return f"{shown} is no name of a site; it needs a character that can be seen"
    if len(name) > LONGEST:
        return f"{shown} is no name of a site: {len(name)} characters, at most {LONGEST}"
    if not name.isprintable():
        return (
            f"{shown} is no name of a site: it holds a control or format character, which could "
            "drive a terminal"
        )

    return None


def check_names(names: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first text that cannot be a site's name."""
    for name in names:
        fault = fault_of(name)
        if fault is not None:
            raise ConfigError(f"{where}: {fault}")


def chosen(names: Sequence[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the names in `wanted`, sorted; raise `ConfigError` for one that is not in `names`."""
    for name in wanted:
        if name not in names:
            known = ", ".join(names[:MOST_SHOWN]) + (" ..." if len(names) > MOST_SHOWN else "")
            raise ConfigError(f"data.sites: there is no site {name[:60]!r}; the sites are {known}")

    return tuple(sorted(wanted))


def check_plain(name: str, where: str) -> None:
    """Raise `ConfigError` unless `name` can be that of a site with a process of its own."""
    if not PLAIN.fullmatch(name):
        raise ConfigError(
            f"{where}: {name[:60]!r} is no name of a site: 1 to 64 letters, digits and _ . -, the "
            "first a letter or a digit"
        )
