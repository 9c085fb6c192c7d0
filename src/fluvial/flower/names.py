"""What people call the runs and sites that Flower knows by number: names.json in the server's
folder."""

import json
from pathlib import Path

from fluvial.storage.files import write_atomically

FILE = "names.json"


def read(path: Path) -> dict[str, dict[str, str]]:
    """Names by number, of "runs" in the order of their submission and of "sites"."""
    return {"runs": {}, "sites": {}, **(json.loads(path.read_text()) if path.exists() else {})}


def add(path: Path, what: str, number: str, name: str) -> None:
    """Give one of the "runs" or "sites" a name."""
    names = read(path)
    names[what][number] = name
    write_atomically(path, json.dumps(names, indent=2).encode())
