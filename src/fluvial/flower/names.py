"""Names of the runs and sites that Flower numbers, and the sites' keys, in names.json in the
server's folder."""

import json
from pathlib import Path

from fluvial.errors import ConfigError
from fluvial.storage.files import write_atomically

FILE = "names.json"
"""Name of the file in the server's folder."""


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return by number the names of "runs" and "sites" in the order in which they were added, and
    the public "keys" of the sites."""
    try:
        given = json.loads(path.read_text()) if path.exists() else {}
        if not all(isinstance(names, dict) for names in given.values()):
            raise ValueError("names are objects by kind")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error!s:.100}); restore it from a copy, or remove it and "
            "register the sites again"
        ) from None
    return {"runs": {}, "sites": {}, "keys": {}, **given}


def add(path: Path, kind: str, number: str, name: str) -> None:
    """Write the name of one of the "runs" or "sites", or one of the "keys"."""
    names = read(path)
    names[kind][number] = name
    write_atomically(path, json.dumps(names, indent=2).encode())
