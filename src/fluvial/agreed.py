"""The configurations that a site has agreed to, one for each run, in files that are known by their digest.

A site trains by such a file and counts its epsilon by it, so a damaged one is refused.
"""

import json
from pathlib import Path

from fluvial.config import RunConfig, parse
from fluvial.errors import CheckpointError, FluvialError
from fluvial.files import digest_of, write_atomically
from fluvial.payload import Value

NAME = "config.json"
"""Name of the file in the folder of a run."""


def keep_config(folder: Path, table: Value) -> None:
    """Write the configuration of the run that is kept in `folder`, as the server sent it."""
    text = {"config": table, "sha256": digest_of(_plain(table))}
    write_atomically(folder / NAME, json.dumps(text).encode())


def config_of(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that is kept in `folder`, None before its hello.

    Raises `CheckpointError` where its file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if digest_of(_plain(found["config"])) != found["sha256"]:
            raise ValueError("its content is not what was written")
        return parse(found["config"], str(path))
    except (ValueError, KeyError, TypeError, FluvialError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; restore {folder} from a copy. Without it this site does "
            "not know what the run has released"
        ) from error


def other_runs(folder: Path) -> list[RunConfig]:
    """Return the configurations of all runs of the site except the one that is kept in `folder`."""
    others = sorted(path.parent for path in folder.parent.glob(f"*/{NAME}"))
    found = [config_of(other) for other in others if other != folder]
    return [config for config in found if config is not None]


def _plain(table: Value) -> bytes:
    return json.dumps(table, sort_keys=True).encode()
