"""Names of the runs and sites that Flower numbers, in names.json in the server's folder."""

import json
from pathlib import Path

from fluvial.storage.files import write_atomically

FILE = "names.json"
"""Name of the file in the server's folder."""


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the names by number: "runs" in the order of their submission, and "sites"."""
    return {"runs": {}, "sites": {}, **(json.loads(path.read_text()) if path.exists() else {})}


def add(path: Path, kind: str, number: str, name: str) -> None:
    """Write the name of one of the "runs" or "sites"."""
    names = read(path)
    names[kind][number] = name
    write_atomically(path, json.dumps(names, indent=2).encode())
